"""Languages by their names, their codes, and the tokens by which models of many languages are told theirs."""

import re
from typing import Any

from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

_NLLB = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]+")  # eng_Latn; and en_XX of mBART


def name_of(language: str) -> str:
    """A language in words: "German" for "de". What is no known code comes back as it is."""
    named = LANGUAGES.get(language.lower())
    return language if named is None else named.title()


def code_of(language: str) -> str:
    """The code of two letters of a language known by name: "de" for "German". Any other comes back as it is."""
    code: str = TO_LANGUAGE_CODE.get(language.lower(), language)
    return code


def language_ids(tokenizer: Any) -> dict[str, int]:
    """The tokens that stand for languages, by the names that checkpoints give them; {} if it has none.

    "de" of M2M100, "de_DE" of mBART, "deu_Latn" of NLLB, "deu" of a Marian that writes several.
    """
    known = getattr(tokenizer, "lang_code_to_id", None)  # M2M100, mBART
    if known is None:
        codes = getattr(tokenizer, "supported_language_codes", None)  # Marian
        marked = codes if codes is not None else filter(_NLLB.fullmatch, tokenizer.all_special_tokens)
        known = {token.strip("<>"): tokenizer.convert_tokens_to_ids(token) for token in marked}
    return {code: token for code, token in known.items() if token != tokenizer.unk_token_id}


def find_language(known: dict[str, int], language: str) -> str | None:
    """The name in `known` of a language that is given by that name, by "de" for "de_DE", or in words."""
    code = code_of(language)
    found = [name for name in known if name == language] or [
        name for name in known if name == code or name.startswith(f"{code}_")
    ]
    return found[0] if len(found) == 1 else None
