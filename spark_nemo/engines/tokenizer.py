"""Text to token ids and back, for a Hugging Face tokenizer folder.

Reads ``tokenizer.json`` with ``tokenizers`` and renders the chat template with ``jinja2`` in
transformers' environment (the tests compare both with transformers). Importing transformers for
this would cost every process two seconds.
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
"""Llama 3.1's end of a message; srt/utils/hf_transformers/common.py of SGLang 0.5.21 makes it a
stop token.
"""


class TokenizerError(ValueError):
    """A tokenizer folder that cannot be used. The message is one line that names the folder and
    what is missing.
    """


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, inverted: byte-level vocabularies are written in them."""
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
    """A special token is written as text or as an object with ``content``."""
    return token.get("content") if isinstance(token, dict) else token


def _uses_byte_level(decoder: object) -> bool:
    """Whether a ``tokenizer.json`` decoder entry is ByteLevel, alone or in a sequence."""
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == "ByteLevel" or any(
        map(_uses_byte_level, decoder.get("decoders", []))
    )


def _template_text(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The default chat template: its own file (newer folders) or an entry of
    ``tokenizer_config.json``.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((item["template"] for item in template if item.get("name") == "default"), None)
    return template


def _compile(template: str) -> jinja2.Template:
    """As transformers compiles chat templates (``transformers.utils.chat_template_utils``), less
    its training masks.
    """

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment.from_string(template)


class Tokenizer:
    """A tokenizer with a chat template and an end-of-sequence token; ``load`` refuses one without."""

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
        """Ids that end a response, from generation_config.json, config.json and the tokenizer, in
        this order; and those that SGLang stops at wherever a tokenizer has them.
        """

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read a folder. Raises ``TokenizerError`` naming the folder and what it lacks."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise TokenizerError(
                f"{folder} has no tokenizer.json: write one with AutoTokenizer(...).save_pretrained"
            )
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.no_padding()
        backend.no_truncation()
        config = _read_json(folder / "tokenizer_config.json")
        template = _template_text(folder, config)
        if not template:
            raise TokenizerError(f"{folder} has no chat template: add chat_template.jinja")
        named = {**_read_json(folder / "special_tokens_map.json"), **config}
        special = {
            name: content
            for name, token in named.items()
            if name.endswith("_token") and isinstance(content := _content(token), str)
        }
        eos_ids: list[int] = []
        for source in ("generation_config.json", "config.json"):
            ids = _read_json(folder / source).get("eos_token_id")
            eos_ids += ids if isinstance(ids, list) else [] if ids is None else [ids]
        own = backend.token_to_id(special.get("eos_token", ""))
        eos_ids += [] if own is None else [own]
        if not eos_ids:
            raise TokenizerError(
                f"{folder} has no end-of-sequence token: set eos_token in tokenizer_config.json or eos_token_id in "
                "generation_config.json"
            )
        eos_ids += [id_ for text in _STOPPED_AT if (id_ := backend.token_to_id(text)) is not None]
        return cls(backend, template, special, tuple(dict.fromkeys(eos_ids)))

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added tokens included (a model's embedding may be larger)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of ``text``; special tokens written in it are recognised, none is added."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The chat template's text for ``messages``, ending where the assistant begins."""
        return self._template.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **self._special_tokens,
        )

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The prompt: ``render_chat`` in token ids.

        Special tokens are the template's alone. A question or response in which one is written out
        would otherwise end its turn and speak for the assistant: a policy could write its own
        verdict.
        """
        if not any(
            text in message["content"] for message in messages for text in self._special_texts
        ):
            return self.encode(self.render_chat(messages))
        mark = uuid.uuid4().hex
        around = self.render_chat(
            [{**message, "content": f"{mark}:{n};"} for n, message in enumerate(messages)]
        )
        ids: list[int] = []
        for piece in re.split(rf"({mark}:\d+;)", around):
            inside = piece.startswith(mark)
            text = messages[int(piece[len(mark) + 1 : -1])]["content"] if inside else piece
            ids += (
                (self._plain if inside else self._backend)
                .encode(text, add_special_tokens=False)
                .ids
            )
        return tuple(ids)

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which special tokens are ordinary characters. Made once: a copy of
        a large vocabulary takes a good part of a second, and a policy that writes special tokens
        would ask for one with every response.
        """
        plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain

    def decode(self, ids: Sequence[int]) -> str:
        """All tokens as text, special ones included; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def decode_response(self, ids: Sequence[int]) -> str:
        """A response's text: ``decode`` without the closing end-of-sequence token, if there is one."""
        return self.decode(ids[:-1] if ids and ids[-1] in self.eos_ids else ids)

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes each token stands for; together they are the bytes of the text.

        Exact for byte-level vocabularies (Qwen, Llama 3, GPT-2), also where a character spans
        tokens. For other kinds a token's bytes are what it adds to the decoded text, a character of
        several tokens going to its last. Raises ``ValueError`` for an unknown id, or when such a
        decoder rewrites earlier text.
        """
        if self._byte_level:
            return [self._bytes_of(id_) for id_ in ids]
        pieces, text = [], ""
        for end in range(1, len(ids) + 1):
            longer = self.decode(ids[:end])
            longer = longer if end == len(ids) else longer.rstrip(REPLACEMENT)
            if not longer.startswith(text):
                raise ValueError(
                    f"token {end - 1} (id {ids[end - 1]}) changes the text before it: no bytes per token"
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
        """Raise ``TokenizerError`` naming those of ``texts`` that do not survive encoding and
        decoding.
        """
        lost = [text for text in texts if self.decode(self.encode(text)) != text]
        if lost:
            raise TokenizerError(
                f"the tokenizer cannot encode {', '.join(map(repr, lost))}, which the format needs"
            )
