"""Text to token ids and back, for a Hugging Face tokenizer folder.

Reads ``tokenizer.json`` with ``tokenizers`` and renders the chat template with ``jinja2`` in
transformers' environment; the tests compare both with transformers. Importing transformers instead
would cost every process two seconds.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_STOPPED_AT = ("<|eom_id|>",)
"""Tokens at which SGLang 0.5.21 stops in any model (srt/utils/hf_transformers/common.py).

Llama 3.1 ends a message with this one.
"""


class TokenizerError(ValueError):
    """A tokenizer folder that cannot be used; the message names the folder and what is missing."""


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's printable character of each byte, inverted, as byte-level vocabularies use."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(hidden)
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{path}: a JSON object is needed, not {type(data).__name__}")
    return data


def _content(token: object) -> object:
    """Return the text of a special token, which is written as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _uses_byte_level(decoder: object) -> bool:
    """True if a decoder entry of ``tokenizer.json`` is ByteLevel, alone or in a sequence."""
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "ByteLevel":
        return True
    return any(_uses_byte_level(part) for part in decoder.get("decoders", []))


def _template_text(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the default chat template: a file of its own or in ``tokenizer_config.json``."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if not isinstance(template, list):
        return template
    for item in template:
        if item.get("name") == "default":
            return item["template"]
    return None


def _compile(template: str) -> jinja2.Template:
    """Compile a chat template as transformers does (``utils.chat_template_utils``).

    Its training masks are left out.
    """

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the named special tokens (``eos_token``, ...) of a folder."""
    named = {**_read_json(folder / "special_tokens_map.json"), **config}
    special = {}
    for name, token in named.items():
        content = _content(token)
        if name.endswith("_token") and isinstance(content, str):
            special[name] = content
    return special


def _eos_ids(folder: Path, backend: tokenizers.Tokenizer, eos_token: str | None) -> tuple[int, ...]:
    """Return the ids of ``Tokenizer.eos_ids``. Raises ``TokenizerError`` when there are none."""
    found: list[int] = []
    for source in ("generation_config.json", "config.json"):
        ids = _read_json(folder / source).get("eos_token_id")
        if isinstance(ids, list):
            found += ids
        elif ids is not None:
            found.append(ids)
    own = backend.token_to_id(eos_token or "")
    if own is not None:
        found.append(own)
    if not found:
        raise TokenizerError(
            f"{folder}: the end-of-sequence token is missing; set eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json"
        )
    for text in _STOPPED_AT:
        stop_id = backend.token_to_id(text)
        if stop_id is not None:
            found.append(stop_id)
    return tuple(dict.fromkeys(found))


class Tokenizer:
    """A tokenizer with a chat template and an end-of-sequence token."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: str,
        special_tokens: Mapping[str, str],
        eos_ids: tuple[int, ...],
    ) -> None:
        self._backend = backend
        self._template = _compile(template)
        self._special_tokens = dict(special_tokens)
        added = backend.get_added_tokens_decoder()
        self._added = {id_: token.content for id_, token in added.items()}
        self._special_texts = tuple(token.content for token in added.values() if token.special)
        self._byte_level = _uses_byte_level(json.loads(backend.to_str())["decoder"])
        self.eos_ids = eos_ids
        """Ids that end a response.

        From generation_config.json, config.json, the tokenizer and ``_STOPPED_AT``, in this order.
        """

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read a folder. Raises ``TokenizerError`` when something is missing."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise TokenizerError(
                f"{folder}: tokenizer.json is missing; write it with "
                "AutoTokenizer(...).save_pretrained"
            )
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.no_padding()
        backend.no_truncation()
        config = _read_json(folder / "tokenizer_config.json")
        template = _template_text(folder, config)
        if not template:
            raise TokenizerError(f"{folder}: the chat template is missing; add chat_template.jinja")
        special = _special_tokens(folder, config)
        eos_ids = _eos_ids(folder, backend, special.get("eos_token"))
        return cls(backend, template, special, eos_ids)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a model's embedding may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of ``text``, with special tokens recognised and none added."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of a chat, ending where the assistant's turn begins."""
        return self._template.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **self._special_tokens,
        )

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the token ids of ``render_chat``; special tokens come from the template only.

        A question or response that spells a special token would otherwise end its turn and begin
        the assistant's: a policy could write its own verdict.
        """
        if not any(
            text in message["content"] for message in messages for text in self._special_texts
        ):
            return self.encode(self.render_chat(messages))
        # Render with marks in place of the contents, then encode template and contents apart.
        mark = uuid.uuid4().hex
        marked = [{**message, "content": f"{mark}:{n};"} for n, message in enumerate(messages)]
        ids: list[int] = []
        for piece in re.split(rf"({mark}:\d+;)", self.render_chat(marked)):
            if piece.startswith(mark):
                number = int(piece[len(mark) + 1 : -1])
                backend = self._plain
                text = messages[number]["content"]
            else:
                backend = self._backend
                text = piece
            ids += backend.encode(text, add_special_tokens=False).ids
        return tuple(ids)

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, which encodes special tokens as ordinary characters.

        Made once: the copy of a large vocabulary takes up to a second, and a policy that writes
        special tokens would need one for every response.
        """
        plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain

    def decode(self, ids: Sequence[int]) -> str:
        """Return all tokens as text, special ones included; invalid UTF-8 becomes U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def decode_response(self, ids: Sequence[int]) -> str:
        """Return the text of a response without its closing end-of-sequence token, if any."""
        ended = bool(ids) and ids[-1] in self.eos_ids
        return self.decode(ids[:-1] if ended else ids)

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token; together they are the bytes of the text.

        Exact for byte-level vocabularies (Qwen, Llama 3, GPT-2), also where a character spans
        tokens. For other kinds a token's bytes are what it adds to the decoded text; a character of
        several tokens goes to the last. Raises ``ValueError`` for an unknown id, or when such a
        decoder rewrites earlier text.
        """
        if self._byte_level:
            return [self._bytes_of(id_) for id_ in ids]
        pieces = []
        text = ""
        for end in range(1, len(ids) + 1):
            longer = self.decode(ids[:end])
            if end < len(ids):
                # The first bytes of a character: the token that completes it gets them.
                longer = longer.rstrip(REPLACEMENT)
            if not longer.startswith(text):
                raise ValueError(
                    f"token {end - 1} (id {ids[end - 1]}) changes the text before it: it has no "
                    "bytes of its own"
                )
            pieces.append(longer[len(text) :].encode())
            text = longer
        return pieces

    def _bytes_of(self, id_: int) -> bytes:
        if id_ in self._added:
            return self._added[id_].encode()
        piece = self._backend.id_to_token(id_)
        if piece is None:
            raise ValueError(f"token id {id_} is not in the vocabulary of {self.vocab_size}")
        return bytes(_byte_of_character()[character] for character in piece)

    def require_tokens(self, texts: Sequence[str]) -> None:
        """Raise ``TokenizerError`` naming the ``texts`` that encoding and decoding change."""
        lost = [text for text in texts if self.decode(self.encode(text)) != text]
        if lost:
            raise TokenizerError(
                f"the tokenizer cannot encode {', '.join(repr(text) for text in lost)}, which the "
                "format needs"
            )
