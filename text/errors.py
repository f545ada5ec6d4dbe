"""What can go wrong between text and tokens. Messages never quote prompt text."""


class TextError(ValueError):
    """Base of the errors of this package; a ValueError, since all of them are about something given."""


class TokenizerError(TextError):
    """The tokenizer's files are missing, damaged or of a kind that is not supported."""


class TextInputError(TextError):
    """The caller's text, token ids or chat messages cannot be used."""


class TemplateError(TextError):
    """The chat template is missing or wrong, or refuses these messages."""


class TemplateLimitError(TemplateError):
    """The chat template needed more time or made more text than it may."""
