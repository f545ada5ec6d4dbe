"""What can be wrong with a model source or with the model store, as one tree of errors.

Every message names the file (and the tensor or key in it) that is wrong and says what would be right,
so that the command line can print it as it is.
"""


class ModelStoreError(Exception):
    """Base of everything that the model store refuses."""


class ModelNotFoundError(ModelStoreError):
    """No prepared model of this name, or no prepared model in this directory."""


class InvalidModelNameError(ModelStoreError):
    """The name cannot be a directory of the store."""


class ModelSourceError(ModelStoreError):
    """A GGUF file, a directory or a package that cannot be turned into a prepared model."""


class SourceNotFoundError(ModelSourceError):
    """The source, or a file that it needs, is not there."""


class DamagedSourceError(ModelSourceError):
    """A file is truncated or corrupt, or its parts contradict each other."""


class UnsupportedSourceError(ModelSourceError):
    """The source is sound, but of a kind that Headrace does not serve."""


class UnsupportedArchitectureError(UnsupportedSourceError):
    """A model architecture, or a variant of one, without an engine implementation."""


class UnsupportedTensorError(UnsupportedSourceError):
    """A tensor of a type that cannot be read."""


class UnsupportedTokenizerError(UnsupportedSourceError):
    """A tokenizer, or a pre-tokenizer, that cannot be rebuilt exactly."""
