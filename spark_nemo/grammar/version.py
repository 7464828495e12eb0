"""The version of the text grammar; whatever is stored or trained on carries it."""

GRAMMAR_VERSION = "1"
