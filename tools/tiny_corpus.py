"""The text that the bundled tiny model is trained on: documentation carried by CPython itself.

Knows where an installed CPython keeps it (`pydoc_data/topics.py` and the docstrings of the
standard library), how to read it without importing any of it, and how it is split into a
training and a held-out part. Knows nothing of tokens or models. The text is the running
interpreter's own, so another CPython version gives another corpus; `fingerprint` tells them
apart.
"""

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

EXCLUDED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "__pycache__"})
TOPICS = Path("pydoc_data") / "topics.py"
SHORTEST_TEXT = 20
LONG_PARAGRAPH = 60
HELD_OUT_ONE_IN = 20

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """One topic, or all docstrings of one module: the unit that is held out as a whole."""

    name: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """Two parts that share no document, no whole text and no long paragraph."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def collect(library: Path | None = None) -> Corpus:
    """Every topic and docstring below `library`, in a fixed order, split by document."""
    library = library or standard_library()
    documents = [*_topics(library), *_docstrings(library)]
    train = _without_repeats(d for d in documents if not is_held_out(d.name))
    held_out = _without_repeats(d for d in documents if is_held_out(d.name))
    return Corpus(train, _without_paragraphs_of(train, held_out))


def is_held_out(name: str) -> bool:
    """Decided by the name alone, so that adding a document moves no other one."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def size_in_bytes(documents: Sequence[Document]) -> int:
    """Length of all texts as UTF-8."""
    return sum(len(text.encode()) for document in documents for text in document.texts)


def fingerprint(corpus: Corpus) -> str:
    """SHA-256 over names, texts and split: equal exactly if the corpora are."""
    digest = hashlib.sha256()
    for part in (corpus.train, corpus.held_out):
        for document in part:
            for text in (document.name, *document.texts):
                digest.update(text.encode() + b"\0")
            digest.update(b"\1")
        digest.update(b"\2")
    return digest.hexdigest()


def _topics(library: Path) -> Iterator[Document]:
    """The reference pages behind `help("for")`, a dictionary literal in the source."""
    tree = ast.parse((library / TOPICS).read_text(encoding="utf-8"))
    literals = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    topics: dict[str, str] = ast.literal_eval(literals[-1])
    for name, text in sorted(topics.items()):
        yield Document(f"topic {name}", (text.strip(),))


def _docstrings(library: Path) -> Iterator[Document]:
    """One document for each module that has docstrings."""
    for path in sorted(_sources(library)):
        relative = path.relative_to(library)
        texts = () if relative == TOPICS else tuple(_docstrings_of(path))
        if texts:
            yield Document(f"module {relative.as_posix()}", texts)


def _sources(folder: Path) -> Iterator[Path]:
    """The .py files below `folder`; excluded folders, which can be vast, are not entered."""
    for path in folder.iterdir():
        if path.is_dir() and path.name not in EXCLUDED_FOLDERS:
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def _docstrings_of(path: Path) -> Iterator[str]:
    """The docstrings of one source file, in `ast.walk` order; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, Documented):
            text = ast.get_docstring(node, clean=False)
            text = inspect.cleandoc(text).strip() if text else ""
            if len(text) >= SHORTEST_TEXT and _is_encodable(text):
                yield text


def _is_encodable(text: str) -> bool:
    """Whether the text has no lone surrogates, which UTF-8 cannot carry."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _without_repeats(documents: Iterable[Document]) -> tuple[Document, ...]:
    """The documents with only the first of equal texts, wherever they occur."""
    seen: set[str] = set()
    kept: list[Document] = []
    for document in documents:
        texts = tuple(t for t in dict.fromkeys(document.texts) if t not in seen)
        seen.update(texts)
        if texts:
            kept.append(Document(document.name, texts))
    return tuple(kept)


def _without_paragraphs_of(
    train: Sequence[Document], held_out: Sequence[Document]
) -> tuple[Document, ...]:
    """`held_out` less each text that repeats one of `train` in whole or by a long paragraph."""
    known: set[str] = set()
    for text in (text for document in train for text in document.texts):
        known |= _marks(text)
    kept: list[Document] = []
    for document in held_out:
        texts = tuple(text for text in document.texts if known.isdisjoint(_marks(text)))
        if texts:
            kept.append(Document(document.name, texts))
    return tuple(kept)


def _marks(text: str) -> set[str]:
    """What makes a text recognisable: itself and its long paragraphs."""
    return {text, *(part for part in text.split("\n\n") if len(part) >= LONG_PARAGRAPH)}
