"""Prompts with images: the model's processor beside its tokenizer, for both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from runners.api import BadRequest, Context, RunnerError
from runners.data.content import ImagePart
from runners.data.images import Images, images_of
from runners.data.prompts import Message, Prompt
from runners.inference.engine import Pictures
from runners.inference.tokens import NO_IMAGES, Texts, load_tokenizer
from runners.inference.vllm_args import Work
from runners.models.sources import Source

_PROBE = "a text"
MAX_PIXELS = 200_000_000
"""Of the images that are decoded at once: 0.6 GB in RGB."""
Row = TypeVar("Row")


class Vision(Texts):
    """`Texts` of a model that takes images."""

    def __init__(self, tokenizer: Any, processor: Any, images: Images) -> None:
        super().__init__(tokenizer)
        self.processor = processor
        self._images = images
        self._as_parts: bool | None = None
        if getattr(tokenizer, "chat_template", None) is None:
            tokenizer.chat_template = getattr(processor, "chat_template", None)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        names = (getattr(processor, "image_token", None), getattr(processor, "boi_token", None))
        self._marks = [str(getattr(each, "content", each)) for each in names if each]
        vocabulary = tokenizer.get_vocab()
        self._mark_ids = {vocabulary[each] for each in self._marks if each in vocabulary}

    def encode(self, prompts: Sequence[Prompt], wheres: Sequence[str]) -> list[tuple[int, ...]]:
        """See `Texts.encode`: prompts without images.

        Raises:
            BadRequest: also for one that writes the model's mark of an image.
        """
        encoded = super().encode(prompts, wheres)
        for token_ids, where in zip(encoded, wheres, strict=True):
            self.check_text(token_ids, where)
        return encoded

    def check_text(self, token_ids: Sequence[int], where: str) -> None:
        """Raises BadRequest for a prompt without images that has the model's mark of one."""
        if not self._mark_ids.isdisjoint(token_ids):
            raise BadRequest(
                f"{where}: its text has the model's mark of an image ({' or '.join(self._marks)}), and there is no "
                "image; leave it out"
            )

    def encode_images(self, prompt: Prompt, where: str) -> Pictures:
        """A prompt with its images.

        Raises:
            BadRequest: the chat template refuses it or leaves an image out, or an image cannot be decoded.
        """
        assert not isinstance(prompt, str), "a text has no images"
        return self.pictured(self.render(prompt, where), images_of(prompt), where)

    def pictured(self, text: str, images: Sequence[ImagePart], where: str) -> Pictures:
        """A prompt as the template wrote it, and its images. Errors as for `encode_images`."""
        found = sum(text.count(each) for each in set(self._marks))
        if found != len(images):
            raise BadRequest(
                f"{where}: {len(images)} images, and {found} marks of an image ({' or '.join(self._marks)}) in the "
                "prompt as the model's chat template writes it; the template has to write one for each image, and the "
                "texts none"
            )
        inputs = self._processed([text], [images], where)
        marked = self.tokenizer(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        return Pictures(tuple(images), text, tuple(marked), tuple(inputs["input_ids"][0].tolist()), where)

    def decoded(self, pictures: Pictures) -> list[Any]:
        """A prompt's images, in RGB."""
        return [self._images.decoded(each, pictures.where) for each in pictures.images]

    def batch(self, prompts: Sequence[Pictures]) -> dict[str, Any]:
        """The model's inputs for some prompts, padded on the left.

        Raises:
            BadRequest: an image was changed.
            RunnerError: the processor made other tokens than before.
        """
        inputs = self._processed([each.text for each in prompts], [each.images for each in prompts], prompts[0].where)
        for row, mask, each in zip(inputs["input_ids"], inputs["attention_mask"], prompts, strict=True):
            if tuple(row[mask.bool()].tolist()) != each.token_ids:
                raise RunnerError(f"{each.where}: the model's processor makes other tokens of it in a batch")
        return inputs

    def _processed(self, texts: list[str], images: Sequence[Sequence[ImagePart]], where: str) -> dict[str, Any]:
        decoded = [[self._images.decoded(each, where) for each in own] for own in images]
        try:
            return dict(
                self.processor(
                    text=texts, images=decoded, padding=True, padding_side="left", truncation=False,
                    add_special_tokens=False, return_tensors="pt",
                )
            )  # fmt: skip
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            line = " ".join(str(error).split())[:300]
            raise BadRequest(f"{where}: the model's processor does not take its images: {line}") from error

    def _templated(self, messages: tuple[Message, ...]) -> list[dict[str, Any]]:
        return [message.templated(as_parts=self.reads_only_parts) for message in messages]

    @property
    def reads_only_parts(self) -> bool:
        """Whether the chat template takes lists of parts only, so that a text has to be one, too."""
        if self._as_parts is None:
            try:
                shown = str(self.tokenizer.apply_chat_template([{"role": "user", "content": _PROBE}], tokenize=False))
            except Exception:  # noqa: BLE001 - a template's own code, which was made for parts
                shown = ""
            self._as_parts = _PROBE not in shown
        return self._as_parts


def by_pixels(rows: Sequence[Row], pictures: Callable[[Row], Pictures | None]) -> Iterator[list[Row]]:
    """The rows in parts whose images can be decoded at once: up to MAX_PIXELS of them, or one row.

    Args:
        pictures: of a row.
    """
    part: list[Row] = []
    pixels = 0
    for row in rows:
        own = pictures(row)
        more = 0 if own is None else own.pixels
        if part and pixels + more > MAX_PIXELS:
            yield part
            part, pixels = [], 0
        part.append(row)
        pixels += more
    if part:
        yield part


def takes_images(config: Any) -> bool:
    """Whether a model of Transformers takes images beside texts."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def loads_with_images(config: Any, work: Work | None) -> bool:
    """Whether a task's model is loaded as one that takes images: the task has some, or it is nothing else.

    Raises:
        BadRequest: the task has images, and the model takes none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    wanted = work is not None and work.images > 0
    if takes_images(config):
        return wanted or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    if work is not None and work.image_where is not None:
        raise BadRequest(f"{work.image_where}: {NO_IMAGES}")
    return False


def model_class(config: Any, work: Work | None) -> Any:
    """The Auto class that loads a task's model. Errors as for `loads_with_images`."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if loads_with_images(config, work) else AutoModelForCausalLM


def load_texts(  # noqa: PLR0917
    ctx: Context, source: Source, trust: bool, config: Any, work: Work | None, cache_dir: str | None = None
) -> Texts:
    """The model's tokenizer, with its processor where it takes images. Raises what Transformers raises, and BadRequest
    as for `loads_with_images`."""
    with_images = loads_with_images(config, work)
    tokenizer = load_tokenizer(source, trust, config, cache_dir)
    if not with_images:
        return Texts(tokenizer)
    from transformers import AutoProcessor

    revision = source.revision if source.tokenizer is None else None
    processor = AutoProcessor.from_pretrained(
        source.tokenizer or source.path, revision=revision, trust_remote_code=trust, cache_dir=cache_dir
    )
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        if work is not None and work.image_where is not None:
            raise BadRequest(f"{work.image_where}: the model {source.shown!r} has no processor of images")
        return Texts(tokenizer)
    return Vision(processor.tokenizer, processor, Images(ctx))
