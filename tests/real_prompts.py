"""32 real prompts: many scripts, emoji, code, from about 10 to about 3,000 tokens.

Texts: the first article of the Universal Declaration of Human Rights in its official translations, and what every
Python installation carries, its own documentation (pydoc_data) and its own source code.
"""

from __future__ import annotations

import inspect
import json.decoder
import textwrap
from pydoc_data.topics import topics

ARTICLE_1 = {
    "English": "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
    "conscience and should act towards one another in a spirit of brotherhood.",
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt "
    "und sollen einander im Geist der Brüderlichkeit begegnen.",
    "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros.",
    "Portuguese": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de "
    "consciência, devem agir uns para com os outros em espírito de fraternidade.",
    "Polish": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem "
    "i sumieniem i powinni postępować wobec innych w duchu braterstwa.",
    "Turkish": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve "
    "birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler.",
    "Vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi. Mọi con người đều "
    "được tạo hoá ban cho lý trí và lương tâm và cần phải đối xử với nhau trong tình anh em.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и "
    "должны поступать в отношении друг друга в духе братства.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι με "
    "λογική και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης.",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميرًا وعليهم أن يعامل بعضهم بعضًا بروح الإخاء.",
    "Hebrew": "כל בני אדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון, לפיכך חובה עליהם לנהוג איש ברעהו ברוח של אחוה.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है "
    "और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다.",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ",
}


def real_prompts() -> list[str]:
    """The 32 prompts, in a fixed order. Lengths in tokens are those of SmolLM2's tokenizer, roughly."""
    source = inspect.getsource(json.decoder)
    return [
        *(f"Translate to English ({language}): {text}\nEnglish:" for language, text in ARTICLE_1.items()),
        "What is the capital of France?",
        "Write one sentence about the sea, please, in plain English.",
        "🎉🎂 Alles Gute! 👩‍👩‍👧‍👦 🇩🇪🇫🇷 ❤️‍🔥 — continue with emoji:",
        "x = [1, 2, 3]\ny = [i ** 2 for i in x]\nprint(sum(y))\n# The output is",
        "def fibonacci(n: int) -> int:\n    '''Return the n-th Fibonacci number.'''\n",
        "SELECT name, count(*) FROM orders\n\tGROUP BY name\n\tHAVING count(*) > 10;\n-- This query",
        "   \n\n\tLeading   and    repeated white space,\r\n\r\nand 1234567890 digits 3.14159\n",
        "∑_{n=1}^{∞} 1/n² = π²/6 ≈ 1.6449; therefore, for ε → 0⁺,",
        f"Explain this code:\n{textwrap.dedent(source[:1500])}\nExplanation:",
        f"Review this module:\n{source[:6000]}\nReview:",
        f"Summarize:\n{topics['assert']}\nSummary:",
        f"Summarize:\n{topics['for']}\nSummary:",
        f"Summarize:\n{topics['with'][:5500]}\nSummary:",
        f"Summarize:\n{topics['types'][:8500]}\nSummary:",
        f"Summarize:\n{topics['specialnames'][:13000]}\nSummary:",
    ]
