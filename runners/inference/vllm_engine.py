"""The vLLM engine, in the task's own process for one GPU or the CPU.

With several GPUs vLLM starts further processes; `EngineProcesses` interrupts a generation that waits for a dead one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import msgspec

from runners.api import BadRequest, Context, RunnerError
from runners.data.cache import COMPILED, library_folder
from runners.inference.engine import Completion, Finished, FinishReason, Output, Request, Same, TokenLogprob, Watch
from runners.inference.members import Lead
from runners.inference.options import Sampling
from runners.inference.task import InferenceTask
from runners.inference.tokens import Reader, Texts
from runners.inference.vision import Vision, by_pixels
from runners.inference.vllm_args import Work
from runners.inference.vllm_failures import Logs, explain, first_line, start_failure, step_failure
from runners.inference.vllm_finite import FiniteLogits
from runners.inference.vllm_nodes import announce
from runners.inference.vllm_prepared import prepare
from runners.inference.vllm_processes import EngineProcesses, cuda_started
from runners.models.adapters import LocalAdapter
from runners.models.sources import Source
from runners.models.weights import not_finite

_alive: list[Any] = []
"""Keeps engines until the process exits: shutting one down takes half a second."""


class VllmEngine:
    """A model in vLLM, loaded by `load`."""

    name = "vllm"

    def __init__(
        self,
        llm: Any,
        texts: Texts,
        adapters: dict[str, Any],
        processes: EngineProcesses,
        source: Source,
        *,
        lead: Lead | None = None,
    ) -> None:
        """
        Args:
            adapters: LoRARequest by name.
            source: of the model, for errors.
            lead: the other members of a task on several nodes.
        """
        self._llm = llm
        self._lead = lead
        self._source = source
        self._texts = texts
        self._adapters = adapters
        self._processes = processes
        self._on_cpu = llm.llm_engine.vllm_config.device_config.device_type == "cpu"
        self.max_positions: int | None = llm.model_config.max_model_len
        self.vocabulary: int | None = llm.model_config.get_vocab_size()

    def check(self, sampling: Sampling, where: str) -> None:
        """See `Engine.check`."""
        config = self._llm.llm_engine.vllm_config
        resolved = self._texts.resolved(sampling)
        try:
            params = sampling_params(resolved, special=self._texts.names_special(resolved.stop))
            params.verify(
                config.model_config, config.speculative_config, config.structured_outputs_config, self._texts.tokenizer
            )
        except Exception as error:  # each of its grammar libraries raises its own types
            field = ".json_schema" if sampling.json_schema is not None else ""
            raise BadRequest(f"{where}{field}: vLLM refuses it: {first_line(error)}") from error

    def describe(self) -> dict[str, Any]:
        config = self._llm.llm_engine.vllm_config
        return {
            "engine": self.name,
            "device": config.device_config.device_type,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "tensor_parallel": config.parallel_config.tensor_parallel_size,
            "eager": config.model_config.enforce_eager,
            "max_model_len": config.model_config.max_model_len,
        }

    def generate(self, requests: Sequence[Request], watch: Watch, finished: Finished) -> None:
        """See `Engine.generate`."""
        with self._members_watched(), self._processes.watched():
            for rows in self._rounds(requests):
                for part in by_pixels(rows, lambda row: requests[row].pictures):
                    self._answer({row: requests[row] for row in part}, watch, finished)

    def _members_watched(self) -> AbstractContextManager[None]:
        return nullcontext() if self._lead is None else self._lead.watched()

    def _rounds(self, requests: Sequence[Request]) -> list[list[int]]:
        """Rows that may run together: all, except on the CPU. There, vLLM 0.32 answers a row without an adapter by
        another row's adapter; rows with different adapters are correct."""
        plain = [row for row, request in enumerate(requests) if request.adapter is None]
        adapted = [row for row, request in enumerate(requests) if request.adapter is not None]
        if plain and adapted and self._on_cpu:
            return [adapted, plain]
        return [list(range(len(requests)))]

    def _answer(self, requests: dict[int, Request], watch: Watch, finished: Finished) -> None:
        """
        Args:
            requests: by their number, which `finished` gets.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        prompts = [self._prompt(request) for request in requests.values()]
        loras = [self._adapters[each.adapter] if each.adapter else None for each in requests.values()]
        resolved = Same(self._texts.resolved)
        params = Same(lambda each: sampling_params(each, special=self._texts.names_special(each.stop)))
        samplings = {number: resolved(request.sampling) for number, request in requests.items()}
        logs = Logs()
        try:
            own = [params(_with_ends(samplings[number], each.ends)) for number, each in requests.items()]
            ids = self._llm.enqueue(prompts, own, lora_request=loras, use_tqdm=False)
        except RunnerError:
            raise  # from `EngineProcesses`
        except EngineDeadError as error:
            raise step_failure(error, logs) from error
        except Exception as error:  # each of its grammar libraries raises its own types
            if all(each.json_schema is None for each in samplings.values()):
                raise
            raise BadRequest(f"spec.inference.json_schema: vLLM refuses it: {first_line(error)}") from error
        # Ids increase in the order of the requests; vLLM may append a random suffix.
        numbers = dict(zip(sorted(_serial(each) for each in ids), requests, strict=True))
        for request_id, output in self._outputs(watch):
            number = numbers.pop(_serial(request_id), None)
            if number is not None:
                finished(number, self._completion(output, requests[number], samplings[number]))
        if numbers:
            raise RunnerError(f"vLLM answered {len(requests) - len(numbers)} of {len(requests)} prompts; see the log")

    def _prompt(self, request: Request) -> dict[str, Any]:
        """A request's prompt as vLLM takes it. vLLM makes the images' tokens by itself, out of their marks."""
        if request.pictures is None:
            return {"prompt_token_ids": list(request.token_ids)}
        assert isinstance(self._texts, Vision), "it encoded them"
        images = self._texts.decoded(request.pictures)
        return {"prompt_token_ids": list(request.pictures.marked_ids), "multi_modal_data": {"image": images}}

    def _outputs(self, watch: Watch) -> Iterable[tuple[str, Any]]:
        """Each request's id and answers, when the last of them is complete."""
        engine, logs = self._llm.llm_engine, Logs()
        while engine.has_unfinished_requests():
            try:
                done = [output for output in engine.step() if output.finished]
            except RunnerError:
                raise  # from `EngineProcesses`
            except Exception as error:
                dtype = str(self._llm.model_config.dtype)
                nan = not_finite(self._source.where, self._source.shown, dtype, None)
                raise step_failure(error, logs, nan) from error
            yield from ((output.request_id, output) for output in done)
            watch.step(tokens=sum(len(answer.token_ids) for output in done for answer in output.outputs))

    def _completion(self, output: Any, request: Request, sampling: Sampling) -> Completion:
        answers = sorted(output.outputs, key=lambda answer: answer.index)
        reader = self._texts.reader(request.token_ids, sampling)
        return Completion(tuple(self._output(answer, reader, sampling) for answer in answers))

    @staticmethod
    def _output(answer: Any, reader: Reader, sampling: Sampling) -> Output:
        if answer.finish_reason not in get_args(FinishReason):
            raise RunnerError(f"vLLM ended an answer with {answer.finish_reason!r}; see the log")
        ids = tuple(answer.token_ids)
        return Output(
            text=reader.text(ids, answer.finish_reason),
            token_ids=ids,
            finish_reason=answer.finish_reason,
            logprobs=_logprobs(ids, answer.logprobs, sampling.logprobs) if sampling.logprobs is not None else None,
        )


def load(
    ctx: Context,
    task: InferenceTask,
    source: Source,
    adapters: Sequence[LocalAdapter],
    *,
    work: Work,
    lead: Lead | None = None,
) -> tuple[VllmEngine, Texts]:
    """The task's model in vLLM, and its tokenizer.

    Args:
        lead: the other members of a task on several nodes, which are started, too.

    Raises:
        BadRequest: no such model, its checkpoint does not hold its weights, or an argument, an adapter or the node
            does not fit it.
        GpuOutOfMemory: it does not fit the GPU.
        RunnerError: the engine did not start, or the hub cannot be reached.
    """
    prepared = prepare(ctx, task, source, adapters, work=work)
    if lead is not None:
        seed = prepared.arguments["seed"]
        prepared = msgspec.structs.replace(
            prepared, arguments=prepared.arguments | announce(lead, work=work, seed=seed)
        )
    set_environment(ctx, alone=prepared.alone, eager=bool(prepared.arguments["enforce_eager"]))
    with nullcontext() if lead is None else lead.watched():
        llm = start(prepared.path, prepared.revision, source, prepared.arguments, asked=list(task.vllm))
        _alive.append(llm)
        if prepared.checks_logits:
            llm.collective_rpc(FiniteLogits.flowmesh_check_logits.__name__)
    texts = prepared.texts
    return VllmEngine(llm, texts, _add_adapters(llm, prepared.runtime), EngineProcesses(), source, lead=lead), texts


def start(path: str, revision: str | None, source: Source, arguments: dict[str, Any], *, asked: Sequence[str]) -> Any:
    """Start vLLM's LLM. Errors as for `load`.

    Args:
        asked: the task's own arguments.
    """
    import pydantic
    from vllm import LLM

    logs = Logs()
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":  # the engine runs in this process
        _inspect_classes_here()
    try:
        return LLM(model=path, tokenizer=source.tokenizer or source.path, revision=revision, **arguments)
    except pydantic.ValidationError as error:
        raise BadRequest(explain(error.errors()[0], source, asked)) from error
    except Exception as error:
        raise start_failure(error, source, logs) from error


def _with_ends(sampling: Sampling, ends: tuple[int, ...]) -> Sampling:
    """The same with an adapter's end tokens, which vLLM does not know."""
    if sampling.ignore_eos:
        return sampling
    return msgspec.structs.replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *ends))


def sampling_params(sampling: Sampling, *, special: bool = False) -> Any:
    """Our Sampling as vLLM's.

    Args:
        special: stop strings are looked for in the text with its special tokens written out.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = sampling.json_schema
    return SamplingParams(
        n=sampling.n,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        bad_words=list(sampling.bad_words) or None,
        logit_bias=sampling.logit_bias or None,
        skip_special_tokens=not special,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        detokenize=bool(sampling.stop),  # only for stop strings: `Texts` decodes the answers
        structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
    )


def set_environment(ctx: Context, *, alone: bool, eager: bool, apart: bool = False) -> None:
    """Set what vLLM reads at its start. A separate process for the engine costs 15 s and can outlive the task.

    Args:
        alone: no processes of workers are needed.
        apart: the engine itself gets a process of its own.
    """
    import torch

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if alone else "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_RAISE_ON_LOGIT_NANS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if "VLLM_CACHE_ROOT" not in os.environ:
        os.environ["VLLM_CACHE_ROOT"] = str(library_folder(ctx, COMPILED, ""))
    if apart or not alone:
        if ctx.gpus:
            torch.cuda.device_count()  # vLLM calls it too; with a lost GPU in the machine it initializes CUDA
        if len(os.listdir("/proc/self/task")) > 1 or cuda_started():
            # Something was computed here, such as a merged adapter. A forked child would wait forever for the threads
            # that did it, which it does not have; and CUDA does not survive a fork.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if eager:
        # The sampler compiles small functions all the same: 4 s with a warm cache, 16 s without, at the first token.
        torch.compiler.set_stance("force_eager")
    if not ctx.gpus:
        torch.set_num_threads(max(ctx.threads, 1))


def _inspect_classes_here() -> None:
    """Have this process find out what a model's class can do.

    vLLM asks another process, which imports vLLM for it, once for each class and cache: what is imported might start
    CUDA in a process that has yet to fork. This one forks no worker.
    """
    from vllm.model_executor.models import registry

    if hasattr(registry, "_run_in_subprocess"):  # not of its interface
        registry._run_in_subprocess = lambda inspect: inspect()


def _serial(request_id: str) -> int:
    return int(request_id.partition("-")[0])


def _add_adapters(llm: Any, adapters: Sequence[LocalAdapter]) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    requests: dict[str, Any] = {}
    for number, adapter in enumerate(adapters, start=1):
        request = LoRARequest(adapter.name, number, str(adapter.folder))
        try:
            llm.llm_engine.add_lora(request)
        except (ValueError, RuntimeError, KeyError, AssertionError, TypeError) as error:
            raise BadRequest(
                f"{adapter.where}: vLLM cannot apply the adapter at run time: {first_line(error)}; set apply: merge"
            ) from error
        requests[adapter.name] = request
    return requests


def _logprobs(ids: Sequence[int], steps: Any, count: int) -> tuple[TokenLogprob, ...]:
    """vLLM's ranked mappings, one per token, as ours."""
    shown = []
    for token_id, ranked in zip(ids, steps, strict=True):
        best = sorted((each.rank, other, each.logprob) for other, each in ranked.items() if each.rank <= count)
        top = tuple((other, float(logprob)) for _, other, logprob in best)
        shown.append(TokenLogprob(token_id, float(ranked[token_id].logprob), top))
    return tuple(shown)
