"""A batch job that fine-tunes vision-language models from a declarative YAML spec."""

__version__ = "0.1.0"
