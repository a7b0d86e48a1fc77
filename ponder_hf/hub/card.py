"""The model card: written from facts, brought up to date at every push, and never over what a person wrote.

The text lies in sections, each between `<!-- section: NAME -->` and `<!-- /section -->`. A comment at the end of the
card holds a hash of every section and every key of the metadata as they were written. What no longer has its hash was
edited, and what is gone was taken out: both are left as they are. So is everything outside the sections.
"""

import hashlib
import json
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ponder_hf import PonderingError
from ponder_hf.errors import first_line


TEMPLATE = Path(__file__).with_name("card.md")
CARD = "README.md"

_SECTION = re.compile(r"<!-- section: (\w+) -->\n(.*?)<!-- /section -->\n?", re.DOTALL)
_STATE = re.compile(r"\n*<!-- ponder_hf wrote (\{.*?\}) -->\n?", re.DOTALL)
# What transformers and peft write by themselves; nobody's words are lost with it.
_GENERIC = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated.",
    "This model card has been generated automatically according to the information the Trainer had access to",
)


def render(facts):
    """A new card with what the Facts say."""
    data = ModelCardData(
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=facts.tags,
        base_model=facts.base_model,
        base_model_relation=None if facts.base_model is None else "adapter" if facts.is_adapter else "finetune",
        datasets=list(facts.datasets) or None,
        language=list(facts.languages) or None,
        eval_results=facts.evaluation_results,
        model_name=facts.name if facts.evaluation_results else None,
        **facts.licence,
    )
    text = str(ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), facts=facts))
    metadata, body = split(text)
    return _fresh(metadata, {name: content.strip() for name, content in _SECTION.findall(body)})


def complete(new, other):
    """The card `new` with those sections and metadata that only `other` has, both cards without any edit."""
    metadata, body = split(new)
    other_metadata, other_body = split(other)
    found, sections = dict(_SECTION.findall(other_body)), dict(_SECTION.findall(body))
    order = [name for name, _ in _SECTION.findall(TEMPLATE.read_text(encoding="utf-8"))]
    both = {name: (sections.get(name) or found.get(name, "")).strip() for name in order}
    return _fresh({**other_metadata, **metadata}, both)


def merge(new, old):
    """The card `new` with everything that a person wrote into the card `old`."""
    if old is None or is_generic(old):
        return new
    new_metadata, new_body = split(new)
    old_metadata, old_body = split(old)
    state = _state(old)
    metadata, kept = _merged_metadata(new_metadata, old_metadata, state.get("metadata", {}))
    sections = dict(_SECTION.findall(_STATE.sub("\n", new_body)))
    written = state.get("sections")
    body = _STATE.sub("\n", old_body)
    if written is None:  # a card of a person's own: only its metadata is completed
        return _assemble(metadata, body, kept, None)
    hashes = {}
    for name, content in sections.items():
        present = dict(_SECTION.findall(body))
        if name in present:
            hashes[name] = written.get(name, _hash(""))
            if _hash(present[name]) == written.get(name):
                body, hashes[name] = body.replace(_block(name, present[name]), _block(name, content)), _hash(content)
        elif name in written:
            hashes[name] = written[name]
        else:
            body, hashes[name] = _inserted(body, list(sections), name, content), _hash(content)
    hashes = {**{name: value for name, value in written.items() if name not in hashes}, **hashes}
    return _assemble(metadata, body, kept, hashes)


def is_generic(card):
    """Whether a library wrote the whole card, and not this one."""
    return not _STATE.search(card) and any(words in " ".join(card.split()) for words in _GENERIC)


def is_untouched(card):
    """Whether a card is as it was written here, without any edit by a person."""
    state = _state(card)
    if not state or is_generic(card):
        return is_generic(card)
    metadata, body = split(card)
    sections = {name: _hash(content) for name, content in _SECTION.findall(body)}
    outside = _SECTION.sub("", _STATE.sub("", body)).strip()
    return (
        not outside
        and sections == state.get("sections")
        and {key: _hash_value(value) for key, value in metadata.items()} == state["metadata"]
    )


def split(card):
    """The metadata of a card as a dict, and the text behind it.

    Raises:
        PonderingError: the metadata is no YAML.
    """
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\r?\n?(.*)", card, re.DOTALL)
    if match is None:
        return {}, card
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise PonderingError(f"the metadata of {CARD} is no YAML ({first_line(error)}): correct it") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise PonderingError(f"the metadata of {CARD} is no list of keys and values: correct it")
    return metadata or {}, match[2]


def check(card):
    """Raise a PonderingError unless huggingface_hub understands the card's metadata."""
    try:
        ModelCard(card)
    except (ValueError, TypeError) as error:
        raise PonderingError(f"the metadata of {CARD} cannot be used: {first_line(error)}") from error


def _merged_metadata(new, old, written):
    """The metadata of both, and the hashes of the keys that are still as they were written here."""
    merged, hashes = dict(old), {}
    for key, value in new.items():
        if key not in old and key in written:  # taken out
            hashes[key] = written[key]
        elif key not in old or _hash_value(old[key]) == written.get(key):
            merged[key], hashes[key] = value, _hash_value(value)
        elif key in written:
            hashes[key] = written[key]
    return merged, {**{key: value for key, value in written.items() if key not in hashes}, **hashes}


def _inserted(body, order, name, content):
    """The text with a new section behind the nearest one that comes before it in the template."""
    present = dict(_SECTION.findall(body))
    before = [each for each in order[: order.index(name)] if each in present]
    if not before:
        return f"{_block(name, content)}\n{body.lstrip()}"
    block = _block(before[-1], present[before[-1]])
    return body.replace(block, f"{block}\n{_block(name, content)}")


def _block(name, content):
    return f"<!-- section: {name} -->\n{content}<!-- /section -->\n"


def _fresh(metadata, sections):
    """A whole card that was written here, from its metadata and its sections, of which empty ones are left out."""
    sections = {name: content for name, content in sections.items() if content}
    body = "\n".join(_block(name, f"{content}\n") for name, content in sections.items())
    hashes = {name: _hash(content) for name, content in sections.items()}
    return _assemble(metadata, body, {key: _hash_value(value) for key, value in metadata.items()}, hashes)


def _assemble(metadata, body, keys, sections):
    """A whole card. keys: the hashes of metadata; sections: those of sections, None in a card of a person's own."""
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    state = json.dumps({"metadata": keys, "sections": sections})
    return f"---\n{header}\n---\n\n{body.strip()}\n\n<!-- ponder_hf wrote {state} -->\n"


def _state(card):
    match = _STATE.search(card)
    try:
        return json.loads(match[1]) if match else {}
    except json.JSONDecodeError:
        return {}


def _hash(text):
    return hashlib.sha256("\n".join(line.rstrip() for line in text.strip().splitlines()).encode()).hexdigest()[:12]


def _hash_value(value):
    return _hash(json.dumps(value, sort_keys=True, default=str))
