"""Token ids to text while they arrive, a whole character at a time."""

import codecs
from collections.abc import Iterable

from text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Gives the text of an answer piece by piece: what `feed` and `flush` return joins to the whole.

    The cost of a token is that of its own bytes, however long the answer is. A character whose bytes are
    spread over several tokens appears with the last of them; bytes that are no UTF-8 become U+FFFD. Control
    tokens are not text. An answer continues its prompt, so a leading space is kept; with `at_start` the
    text stands by itself, and the space that SentencePiece-like tokenizers put in front of it is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = at_start and tokenizer.strips_leading_space

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that `token_ids` complete; empty while a character is unfinished."""
        return self._without_first_space(self._decoder.decode(self._tokenizer.text_bytes(token_ids)))

    def flush(self) -> str:
        """The end of the text: U+FFFD if it stopped within a character."""
        return self._without_first_space(self._decoder.decode(b"", final=True))

    def _without_first_space(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text
