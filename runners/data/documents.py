"""The text of a document: plain text of any suffix, HTML, PDF, docx. The first bytes decide, then the suffix."""

from __future__ import annotations

import importlib.util
import io
import logging
import zipfile
from pathlib import PurePosixPath

from flowmesh import installed
from runners.data.text_files import HEAD_BYTES, encoding_of

HTML = frozenset({".html", ".htm", ".xhtml"})
_HTML_STARTS = ("<!doctype html", "<html")
_WITHOUT_TEXT = ("script", "style", "noscript", "template", "svg", "img")
MAX_UNPACKED_BYTES = 256 * 2**20
_OLD_OFFICE = b"\xd0\xcf\x11\xe0"


class UnreadableDocument(ValueError):
    """Raised when a document's text cannot be read. The message is the reason, without the name."""


class BinaryFile(UnreadableDocument):
    """Raised when a file looks like binary data instead of a document."""


def document_text(data: bytes, name: str) -> str:
    """The text of a document. Titles, headings and tables are Markdown.

    Args:
        data: the whole file.
        name: its file name, for the suffix.

    Raises:
        UnreadableDocument: it has no text, is encrypted or damaged, or of a format that is not read.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if not data:
        raise UnreadableDocument("empty")
    if data.lstrip()[:5] == b"%PDF-" or suffix == ".pdf":
        text = pdf_text(data)
    elif data.startswith(b"PK\x03\x04"):
        text = _docx(data, suffix)
    elif suffix == ".docx":
        raise UnreadableDocument("encrypted, or not a sound docx" if data.startswith(_OLD_OFFICE) else "damaged docx")
    elif data.startswith(_OLD_OFFICE):
        raise UnreadableDocument("an old Office format, which is not read; save it as docx or PDF")
    elif data.startswith(b"{\\rtf"):
        raise UnreadableDocument("RTF, which is not read; save it as docx or PDF")
    elif suffix in HTML or data[:512].lstrip().lower().startswith(tuple(each.encode() for each in _HTML_STARTS)):
        text = _html(data)
    else:
        text = _plain(data)
    if not text.strip():
        raise UnreadableDocument("no text in it")
    return text


def _plain(data: bytes) -> str:
    encoding = encoding_of(data[:HEAD_BYTES])
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\0" in data[:8192]:
            raise BinaryFile("a binary file") from None
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} in line {line}"
        raise UnreadableDocument(f"not {encoding.removesuffix('-sig').upper()} text ({found})") from None
    if "\0" in text:
        raise BinaryFile("a binary file")
    return text


def _html(data: bytes | str) -> str:
    _need("markdownify", "HTML")
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    plain = {"escape_asterisks": False, "escape_underscores": False, "escape_misc": False}
    page = BeautifulSoup(data, "html.parser")  # detects the charset of the page
    if page.contains_replacement_characters:
        raise UnreadableDocument(f"HTML whose bytes are not {page.original_encoding or 'of any known encoding'}")
    for element in page(_WITHOUT_TEXT):
        element.decompose()
    return str(MarkdownConverter(heading_style="ATX", **plain).convert_soup(page)).strip()


def pdf_text(data: bytes) -> str:
    """The text of a PDF.

    Raises:
        UnreadableDocument: it has none, is encrypted or damaged, or pypdf is not installed.
    """
    _need("pypdf", "PDF")
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns about every defect that it repairs
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableDocument("an encrypted PDF")
        text = "\n\n".join(page.extract_text() for page in reader.pages)
    except (UnreadableDocument, MemoryError):
        raise
    except pypdf.errors.DependencyError:
        raise UnreadableDocument("an encrypted PDF") from None
    except Exception as error:  # noqa: BLE001 - a damaged document may raise anything in its parser
        raise UnreadableDocument(f"a damaged PDF ({_line(error)})") from None
    if not text.strip():
        raise UnreadableDocument("a PDF without text, perhaps scanned pages")
    return text


def _docx(data: bytes, suffix: str) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as pack:
            is_word = "word/document.xml" in pack.namelist()
            size = sum(each.file_size for each in pack.infolist() if each.filename.endswith((".xml", ".rels")))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UnreadableDocument(f"a damaged docx or zip archive ({_line(error)})") from None
    if not is_word:
        raise UnreadableDocument(f"a zip archive{f' called {suffix}' if suffix else ''}, of which only docx is read")
    if size > MAX_UNPACKED_BYTES:
        raise UnreadableDocument(f"a docx of more than {MAX_UNPACKED_BYTES} bytes when unpacked")
    _need("mammoth", "docx")
    import mammoth

    try:
        page = mammoth.convert_to_html(io.BytesIO(data), convert_image=mammoth.images.img_element(lambda _: {}))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged document may raise anything in its parser
        raise UnreadableDocument(f"a damaged docx ({_line(error)})") from None
    return _html(page.value)


def _need(library: str, what: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise UnreadableDocument(f"{what}, which needs {library} ({installed.install_command('rag')})")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
