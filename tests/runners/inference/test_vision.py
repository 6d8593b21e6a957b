"""Images in prompts, on Transformers: answers of the bare library, bounds, read roots, rows, batch files, children."""

from __future__ import annotations

import base64
import functools
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")
pytest.importorskip("PIL", reason="needs the extra 'inference'")
from PIL import Image

from runners.api import BadRequest
from runners.data import content as parts
from runners.data import images as reading
from runners.inference.runner import InferenceRunner
from runners.models.builtin import TINY_VISION
from tests.kit.batch_files import chat, completion, read, write
from tests.kit.batch_files import spec_of as batch_of
from tests.kit.file_server import Served, Server
from tests.kit.inference_specs import outputs, spec_of
from tests.kit.paths import PERMITS

TEXT = {"type": "text", "text": "a task starts"}


def picture(color: str, size: tuple[int, int] = (48, 24), kind: str = "PNG", **options: Any) -> bytes:
    """One half of a color, the other black, so that turning it shows."""
    image = Image.new("RGB", size, color)
    image.paste("black", (0, 0, size[0] // 2, size[1]))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


RED, BLUE = (data_url(picture(color)) for color in ("red", "blue"))


@pytest.fixture
def run(make_context):
    def do(*items: Any, model: Any = TINY_VISION, engine: str = "transformers", **context: Any) -> dict[str, Any]:
        return InferenceRunner().run(make_context(spec_of(model, list(items), engine), **context))

    return do


@functools.cache
def library(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)


def bare(folder: Path, messages: list[dict[str, Any]], images: list[Any]) -> str:
    """The answer as Transformers' documentation gets it."""
    processor, model = library(folder)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[images] if images else None, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(ids, skip_special_tokens=True))


def test_answers_are_the_bare_librarys_for_any_number_of_images(run, tmp_path, shared_cache) -> None:
    (tmp_path / "blue.jpg").write_bytes(picture("blue", kind="JPEG"))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    (tmp_path / "turned.jpg").write_bytes(picture("red", kind="JPEG", exif=exif))
    items = [
        user(image(RED, detail="low"), TEXT),
        user(TEXT, image(str(tmp_path / "blue.jpg"))),
        user(image(RED), TEXT, {"type": "image", "image": (tmp_path / "blue.jpg").as_uri()}),
        user(TEXT),
        "a task starts",
        user(image(str(tmp_path / "turned.jpg")), TEXT),
        user(image(BLUE), TEXT),
    ]
    result = run(*items)
    folder = shared_cache / "builtin" / "tiny-vision-v1"
    mark = {"type": "image"}
    red, blue = (Image.open(io.BytesIO(picture(color))).convert("RGB") for color in ("red", "blue"))
    jpeg = Image.open(tmp_path / "blue.jpg").convert("RGB")
    turned = Image.open(tmp_path / "turned.jpg").convert("RGB").transpose(Image.Transpose.ROTATE_270)
    expected = [
        bare(folder, user(mark, TEXT), [red]),
        bare(folder, user(TEXT, mark), [jpeg]),
        bare(folder, user(mark, TEXT, mark), [red, jpeg]),
        bare(folder, user(TEXT), []),
        None,
        bare(folder, user(mark, TEXT), [turned]),
        bare(folder, user(mark, TEXT), [blue]),
    ]
    found = outputs(result)
    assert [a for a, b in zip(found, expected, strict=True) if b] == [b for b in expected if b]
    assert len({found[0], found[5], found[6]}) == 3, "the image makes no difference"
    shown = result["items"][0]["prompt"][0]["content"]
    assert shown[0]["image_url"]["detail"] == "low"
    assert len(shown[0]["image_url"]["url"]) < 150, "the image's bytes do not belong into the result"
    assert result["items"][0]["metadata"]["rendered_prompt"].count("<image>") == 1


def stored(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_a_hole(mode: str) -> bytes:
    """Transparent, black beneath; its last pixel is opaque."""
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 255))
    return stored(image.convert(mode))


GREY = (0, 0, 0), (128, 128, 128), (255, 255, 255)
HOLE = (255, 255, 255), (255, 255, 255), (0, 0, 0)
PREVIEW = stored(Image.new("RGB", (3, 1), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (3, 1))])


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (stored(Image.frombytes("I;16", (3, 1), struct.pack("<3H", 0, 0x8080, 0xFFFF))), GREY),
        (with_a_hole("RGBA"), HOLE),
        (with_a_hole("LA"), HOLE),
        (stored(Image.new("CMYK", (3, 1), (0, 255, 255, 0)), "JPEG"), [(255, 0, 0)] * 3),
        (PREVIEW, [(254, 0, 0)] * 3),
    ],
    ids=["16 bits", "alpha", "grey and alpha", "cmyk", "a photo with a preview"],
)
def test_an_image_is_what_a_viewer_shows(make_context, data, pixels) -> None:
    images = reading.Images(make_context({}))
    part = images.checked(parts.ImagePart(data_url(data)), "here")
    decoded = images.decoded(part, "here")
    assert [decoded.getpixel((x, 0)) for x in range(3)] == [tuple(each) for each in pixels]


def bomb() -> bytes:
    """A PNG whose header says 60000 × 60000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


WHERE = r"spec\.data\.items\[0\]\[0\]\.content\[0\]"
REFUSED = {
    "audio": ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, rf"{WHERE}\.type: expected text"),
    "video": ({"type": "video_url", "video_url": {"url": "x"}}, rf"{WHERE}\.type: expected text, image_url or image"),
    "field": (image(RED, size=3), rf"{WHERE}\.image_url\.size: unknown field"),
    "detail": (image(RED, detail="best"), rf"{WHERE}\.detail: expected auto, low or high"),
    "two places": (
        {"type": "image", "image": RED, "path": "b.png"},
        rf"{WHERE}\.path: another place of the image than",
    ),
    "no place": (image(""), rf"{WHERE}\.image_url\.url: expected a data URL, a path"),
    "no base64": (image("data:image/png;base64,%%%"), rf"{WHERE}: .*not base64"),
    "not in base64": (image("data:image/png,abc"), rf"{WHERE}: expected a data URL of an image in base64"),
    "a text": (image("data:text/plain;base64,YQ=="), rf"{WHERE}: expected a data URL of an image"),
    "no image": (image(data_url(b"%PDF-1.4")), rf"{WHERE}: is no image of a format"),
    "postscript": (image(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), rf"{WHERE}: is no image"),
    "bomb": (image(data_url(bomb())), rf"{WHERE}: the image has more than 50 million pixels"),
    "animation": (image(data_url(animation(), "gif")), rf"{WHERE}: an animation"),
    "cut off": (image(data_url(picture("red", (400, 400), "JPEG")[:900], "jpeg")), "data are damaged"),
    "scheme": (image("gopher://x/y.png"), rf"{WHERE}: 'gopher' is not read"),
    "elsewhere": (image("file://other/y.png"), rf"{WHERE}: a file URL of another machine"),
    "nothing": (image("no/such.png"), rf"{WHERE}: .* cannot be read: No such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused_by_its_place(run, name: str) -> None:
    part, message = REFUSED[name]
    with pytest.raises(BadRequest, match=message):
        run(user(part, TEXT))


def test_bounds_of_bytes_and_number(run, monkeypatch) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", 2**20)
    for url in (data_url(bytes(2**20 + 6)), "big"):
        Path("big").write_bytes(bytes(2**20 + 1)) if url == "big" else None
        try:
            with pytest.raises(BadRequest, match="more than 1 MiB"):
                run(user(image(url), TEXT))
        finally:
            Path("big").unlink(missing_ok=True)
    with pytest.raises(BadRequest, match=rf"content: more than {parts.MAX_IMAGES} images"):
        run(user(*[image(RED)] * (parts.MAX_IMAGES + 1)))


def test_an_image_behind_a_url_goes_where_downloads_may(run) -> None:
    with Server().running() as server:
        server.files["red.png"] = Served(picture("red"))
        item = user(image(server.url("red.png")), TEXT)
        assert outputs(run(item)) == outputs(run(user(image(RED), TEXT)))
        with pytest.raises(BadRequest, match=rf"{WHERE}: .*404"):
            run(user(image(server.url("none.png")), TEXT))
        permits = msgspec.structs.replace(PERMITS, local_hosts=())
        with pytest.raises(BadRequest, match=WHERE):
            run(item, permits=permits)


def test_adapters_and_system_prompts_go_with_images(run, make_context, shared_cache, tmp_path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    item = user(image(RED), TEXT)
    plain = outputs(run(item))
    model = AutoModelForImageTextToText.from_pretrained(shared_cache / "builtin" / "tiny-vision-v1")
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in lora.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, 0.3)
    lora.save_pretrained(tmp_path / "lora")
    spec = spec_of(TINY_VISION, [item])
    answers = []
    for apply in ("runtime", "merge"):
        spec["model"]["adapters"] = [{"path": str(tmp_path / "lora"), "apply": apply}]
        answers.append(outputs(InferenceRunner().run(make_context(spec))))
    assert answers[0] == answers[1] != plain
    system = spec_of(TINY_VISION, [item], system_prompt="be brief")
    said = [{"role": "system", "content": "be brief"}, *item]
    assert outputs(InferenceRunner().run(make_context(system))) == outputs(run(said)) != plain


def test_read_roots_hold(run, tmp_path) -> None:
    (tmp_path / "secret").mkdir()
    secret = tmp_path / "secret" / "image.png"
    secret.write_bytes(picture("red"))
    (tmp_path / "results" / "task-1").mkdir(parents=True)
    link = tmp_path / "results" / "task-1" / "link.png"
    link.symlink_to(secret)
    permits = msgspec.structs.replace(PERMITS, own_user=False, read_roots=())
    for url in (str(secret), secret.as_uri(), str(link), f"{link.parent}/../../secret/image.png", "/dev/zero"):
        with pytest.raises(BadRequest, match="lies outside of the folders"):
            run(user(image(url), TEXT), permits=permits)
    link.unlink()
    link.write_bytes(picture("red"))
    assert run(user(image(str(link)), TEXT), permits=permits)["ok"]


def test_a_model_that_takes_no_images(run, tiny_llama) -> None:
    """Texts in parts it takes, as one text."""
    with pytest.raises(BadRequest, match=r"^spec\.data\.items\[1\]: holds an image, and the model takes none"):
        run("a task", user(image(RED), TEXT), model=tiny_llama)
    in_parts, as_text = user(TEXT, TEXT), [{"role": "user", "content": "a task starts\na task starts"}]
    assert run(in_parts, model=tiny_llama)["items"] == run(as_text, model=tiny_llama)["items"]


def test_marks_in_the_prompt_are_the_images(run, shared_cache, tmp_path) -> None:
    """Else an image would silently stand in another's place, or be left out."""
    for item in (user(image(RED), {"type": "text", "text": "not <image>"}), user({"type": "text", "text": "<image>"})):
        with pytest.raises(BadRequest, match="mark"):
            run(item)
    with pytest.raises(BadRequest, match="mark"):
        run("a task <image>")
    deaf = tmp_path / "deaf"
    deaf.mkdir()
    for file in (shared_cache / "builtin" / "tiny-vision-v1").iterdir():
        (deaf / file.name).write_bytes(file.read_bytes())
    template = (deaf / "chat_template.jinja").read_text()
    (deaf / "chat_template.jinja").write_text(template.replace("{% else %}<image>{% endif %}", "{% endif %}"))
    with pytest.raises(BadRequest, match=r"items\[0\]: 1 images, and 0 marks of an image"):
        run(user(image(RED), TEXT), model=deaf)


def test_a_prompt_that_is_too_long_is_not_cut(run) -> None:
    with pytest.raises(BadRequest, match=r"the prompt has \d{4} tokens; the model takes 2048"):
        run(user(*[image(RED)] * 20, {"type": "text", "text": "a task starts " * 900}))


def test_rows_go_by_what_the_image_shows(run, tmp_path) -> None:
    file, other = tmp_path / "image.png", tmp_path / "other.png"
    file.write_bytes(picture("red"))
    items = [user(image(str(file)), TEXT), user(image(BLUE), TEXT)]
    first = run(*items)
    file.rename(other)
    moved = run(user(image(str(other)), TEXT), items[1], anew=False)
    assert moved["rows"]["reused"] == 2
    assert outputs(moved) == outputs(first)
    other.write_bytes(picture("green"))
    changed = run(user(image(str(other)), TEXT), items[1], anew=False)
    assert changed["rows"]["reused"] == 1
    assert outputs(changed)[0] != outputs(first)[0]


def test_an_image_that_changes_meanwhile(run, tmp_path, monkeypatch) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(picture("red"))
    from runners.inference import runner

    load = runner.load_engine

    def changing(*args: Any, **kwargs: Any) -> Any:
        file.write_bytes(picture("green"))
        return load(*args, **kwargs)

    monkeypatch.setattr(runner, "load_engine", changing)
    with pytest.raises(BadRequest, match="was changed while the task ran"):
        run(user(image(str(file)), TEXT))


def test_children_and_their_images(run, tiny_llama, tmp_path) -> None:
    blue = spec_of(TINY_VISION, [user(image(BLUE), TEXT)])
    bad = spec_of(TINY_VISION, [user(image("no/such.png"), TEXT)])
    children = [{"task_id": "blue", "spec": blue}, {"task_id": "bad", "spec": bad}]
    result = run("a task", children=children)
    assert outputs(result["children"]["blue"]) == outputs(run(user(image(BLUE), TEXT)))
    assert "merge_children[1].spec.data.items[0][0].content[0]" in result["children"]["bad"]["error"]
    seeing = spec_of(tiny_llama, [user(image(BLUE), TEXT)])
    refused = run("a task", model=tiny_llama, children=[{"task_id": "c", "spec": seeing}])
    assert refused["ok"]
    assert "takes none" in refused["children"]["c"]["error"]


def test_a_batch_file_has_images(run, make_context, tmp_path) -> None:
    (tmp_path / "blue.png").write_bytes(picture("blue"))
    good, path, text = user(image(RED), TEXT), user(image(str(tmp_path / "blue.png")), TEXT), user(TEXT)
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions",
                    "body": {"messages": messages, "max_tokens": 16, "temperature": 0}})
        for name, messages in {
            "red": good, "blue": path, "text": text, "bad": user(image("data:image/png;base64,%"), TEXT),
            "mark": user({"type": "text", "text": "<image>"}),
        }.items()
    ]  # fmt: skip
    file = write(tmp_path / "batch.jsonl", *lines, chat("plain", max_tokens=4), completion("a mark", "<image>"))
    context = make_context(batch_of(TINY_VISION, file))
    InferenceRunner().run(context)
    answers = {line["custom_id"]: line["response"]["body"] for line in read(context.artifacts_dir / "output.jsonl")}
    listed = outputs(run(good, path, text))
    assert [answers[name]["choices"][0]["message"]["content"] for name in ("red", "blue", "text")] == listed
    errors = {line["custom_id"]: line["error"]["error"] for line in read(context.artifacts_dir / "errors.jsonl")}
    assert set(errors) == {"bad", "mark", "a mark"}
    assert "body.messages[0].content[0]: what follows" in errors["bad"]["message"]
    assert [error["param"] for error in errors.values()] == ["messages", "messages", "prompt"]


def test_images_of_a_table(run, make_context, tmp_path) -> None:
    """A data set's image feature: its bytes, or its path."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turn = lambda value: [{"role": "user", "content": [  # noqa: E731
        {"type": "image", "image": value, "text": None}, {"type": "text", "image": None, "text": "a task starts"},
    ]}]  # fmt: skip
    (tmp_path / "blue.png").write_bytes(picture("blue"))
    rows = [
        {"messages": turn({"bytes": picture("red"), "path": None})},
        {"messages": turn({"bytes": None, "path": str(tmp_path / "blue.png")})},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    spec = spec_of(TINY_VISION, [])
    spec["data"] = {"type": "parquet", "path": str(tmp_path / "rows.parquet"), "column": "messages"}
    result = InferenceRunner().run(make_context(spec))
    expected = outputs(run(user(image(RED), TEXT), user(image(BLUE), TEXT)))
    assert outputs(result) == expected
    text = TEXT["text"]
    columns = [{"question": text, "image": row["messages"][0]["content"][0]["image"]} for row in rows]
    columns.append({"question": text, "image": None})
    parquet.write_table(pa.Table.from_pylist(columns), tmp_path / "columns.parquet")
    spec["data"] |= {"path": str(tmp_path / "columns.parquet"), "column": "question", "image_column": "image"}
    assert outputs(InferenceRunner().run(make_context(spec))) == [*expected, *outputs(run(user(TEXT)))]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": text, "images": [RED, str(tmp_path / "blue.png")]}))
    spec["data"] |= {"type": "jsonl", "path": str(tmp_path / "rows.jsonl"), "image_column": "images"}
    assert outputs(InferenceRunner().run(make_context(spec))) == outputs(run(user(image(RED), image(BLUE), TEXT)))
    spec["data"]["image_column"] = "picture"
    with pytest.raises(BadRequest, match=r"spec\.data\.image_column: no column 'picture'"):
        InferenceRunner().run(make_context(spec))
