"""Documents as text: plain text, HTML, docx, and PDF where pypdf is installed."""

from __future__ import annotations

import codecs
import io
import re
import zipfile
from pathlib import PurePosixPath
from xml.etree import ElementTree

from runners.agent.html_text import html_text
from runners.data import documents

TEXT = frozenset([
    ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".ini", ".log", ".xml", ".py",
    ".js", ".ts", ".c", ".h", ".cpp", ".java", ".go", ".rs", ".sh", ".sql", ".tex",
])  # fmt: skip
NO_TEXT = ("image/", "audio/", "video/", "font/")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_DECLARED = re.compile(rb"""<(?:meta\b[^>]*?charset|\?xml\b[^>]*?encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_AS_ON_THE_WEB = {"iso8859-1": "cp1252", "ascii": "cp1252"}
"""What browsers take these for."""
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
    if kind.startswith(NO_TEXT) and not kind.endswith("+xml"):
        raise UnreadableDocument(f"{name!r} has a format that cannot be read here ({kind})")
    if (
        data.startswith(tuple(mark for mark, _ in _MARKS))
        or suffix in TEXT
        or kind.startswith("text/")
        or kind in ("application/json", "application/xml")
        or b"\0" not in data[:4096]
    ):
        return _decoded(data, content_type)
    raise UnreadableDocument(f"{name!r} has a format that cannot be read here ({kind or suffix or 'unknown'})")


def _decoded(data: bytes, content_type: str) -> str:
    """Its text by its byte order mark, else the header's charset, else the one that it declares, else UTF-8."""
    charset = content_type.lower().partition("charset=")[2].partition(";")[0].strip(" \"'")
    declared = _DECLARED.search(data[:4096]) if data.lstrip()[:1] == b"<" else None
    named = charset or (declared[1].decode("ascii", "replace") if declared else "")
    if not charset and named.lower().startswith("utf-16"):  # what declares it in ASCII is not it
        named = ""
    marked = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    try:
        known = codecs.lookup(marked or named or "utf-8").name
        return data.decode(_AS_ON_THE_WEB.get(known, known), errors="replace")
    except (LookupError, ValueError):  # unknown, or a codec of Python that is no charset
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
