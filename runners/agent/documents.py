"""Documents as text: plain text, HTML, docx, and PDF where pypdf is installed."""

from __future__ import annotations

import io
import zipfile
from pathlib import PurePosixPath
from xml.etree import ElementTree

from runners.agent.html_text import html_text
from runners.data import documents

TEXT = frozenset([
    ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".ini", ".log", ".xml", ".py",
    ".js", ".ts", ".c", ".h", ".cpp", ".java", ".go", ".rs", ".sh", ".sql", ".tex",
])  # fmt: skip
MAX_XML_BYTES = 64 * 2**20
_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"


class UnreadableDocument(ValueError):
    """Its content does not match its format, or the format is unknown. The message is for the model."""


def document_text(data: bytes, name: str, content_type: str = "") -> str:
    """The text of a document.

    Args:
        name: file name or address. It decides the format, together with `content_type`.

    Raises:
        UnreadableDocument: no text can be read from it.
    """
    suffix = PurePosixPath(name.split("?", maxsplit=1)[0]).suffix.lower()
    kind = content_type.partition(";")[0].strip().lower()
    if data.startswith(b"%PDF") or kind == "application/pdf" or suffix == ".pdf":
        return _pdf(data)
    if suffix == ".docx" or kind.endswith("wordprocessingml.document"):
        return _docx(data)
    if kind in ("text/html", "application/xhtml+xml") or suffix in (".html", ".htm"):
        return html_text(_decoded(data, content_type), name)
    if (
        suffix in TEXT
        or kind.startswith("text/")
        or kind in ("application/json", "application/xml")
        or b"\0" not in data[:4096]
    ):
        return _decoded(data, content_type)
    raise UnreadableDocument(f"{name!r} has a format that cannot be read here ({kind or suffix or 'unknown'})")


def _decoded(data: bytes, content_type: str) -> str:
    charset = content_type.lower().partition("charset=")[2].partition(";")[0].strip(" \"'") or "utf-8-sig"
    try:
        return data.decode(charset, errors="replace")
    except LookupError:
        return data.decode(errors="replace")


def _docx(data: bytes) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as pack, pack.open("word/document.xml") as part:
            xml = part.read(MAX_XML_BYTES + 1)
        if len(xml) > MAX_XML_BYTES or b"<!DOCTYPE" in xml[:2000]:
            raise UnreadableDocument("the document is too large, or declares entities")
        root = ElementTree.fromstring(xml)
    except (zipfile.BadZipFile, KeyError, ElementTree.ParseError) as error:
        raise UnreadableDocument(f"not a valid .docx: {error}") from None
    lines = []
    for paragraph in root.iter(f"{_WORD}p"):
        pieces = []
        for node in paragraph.iter():
            if node.tag == f"{_WORD}t":
                pieces.append(node.text or "")
            elif node.tag in (f"{_WORD}tab", f"{_WORD}br"):
                pieces.append("\t" if node.tag.endswith("tab") else "\n")
        lines.append("".join(pieces))
    return "\n".join(lines).strip()


def _pdf(data: bytes) -> str:
    try:
        return documents.pdf_text(data).strip()
    except documents.UnreadableDocument as error:
        raise UnreadableDocument(f"cannot be read: {error}") from None
