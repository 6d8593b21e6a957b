"""PPO on Accelerate: generate responses, score them, update the policy; repeat until the last step.

TRL has removed its own. This is the loop; `ppo_math` has the formulas, and the rest is shared with the other trainers.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from torch.optim import AdamW
from transformers import get_scheduler, set_seed
from trl.trainer.utils import disable_dropout_in_model

from flowmesh.files.removal import clear
from runners.api import BadRequest
from runners.models.sources import Source
from runners.training import data, models, ppo_checkpoint, prompts, rewards, saving, tracking
from runners.training.arguments import checkpoints_dir, completion_length
from runners.training.bounds import Bounds
from runners.training.checkpoints import Start
from runners.training.devices import Device
from runners.training.plan import Plan, check
from runners.training.ppo_batches import Order, sizes, updates
from runners.training.ppo_model import PolicyWithValue
from runners.training.ppo_rollout import Roller
from runners.training.ppo_update import Updater, trainable
from runners.training.settings import PpoArgs, PpoTraining
from runners.training.setup import Setup


class PpoJob:
    """A PPO run with everything loaded."""

    eval_size = 0
    best_step: int | None = None

    def __init__(self, setup: Setup) -> None:
        plan, ctx, device, place = setup.plan, setup.ctx, setup.device, setup.place
        assert isinstance(plan.training, PpoTraining)
        if setup.layout.spread:
            raise BadRequest("spec.model.transformers.device_map: ppo lays no model over several GPUs; leave it out")
        self._plan, self._ctx, self._place, self._meter = plan, ctx, place, setup.meter
        self._args = check(ctx, plan.training.trainer_args, PpoArgs, "spec.training.trainer_args")
        self._sizes = sizes(plan, ctx.log.warning)
        self.start = start = setup.start
        self._tokenizer = models.load_tokenizer(plan, start)
        rows = data.load(plan, ctx, setup.fetched.jsonl)
        prompts.check_chat(rows, self._tokenizer, start)
        length = completion_length(plan)
        rows = prompts.fit(rows, self._tokenizer, plan.training.max_seq_length - length, ctx)
        self._rows, self.dropped, self.truncated = rows.dataset, rows.dropped, rows.truncated
        self.dataset_size = len(self._rows)
        found = rewards.load(plan, ctx, device.name, rows)
        self._tracking = tracking.begin(plan, ctx, start)
        self._accelerator = Accelerator(
            log_with=list(self._tracking.names) or None,
            project_config=ProjectConfiguration(logging_dir=str(ctx.artifacts_dir / tracking.LOCAL)),
            mixed_precision=_precision(plan, device),
            cpu=not device.cuda,
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=bool(plan.training.ddp_find_unused_parameters))
            ],
        )
        self.samples_a_step = self._sizes.update * place.world
        self._total = updates(plan, self.dataset_size, self.samples_a_step)
        self._prepare(plan, start, device)
        prompts.check_bounds(rows, self._tokenizer, Bounds(self._policy.policy, self._tokenizer), length)
        if place.world > 1:  # with one seed, all ranks would sample the same completions
            set_seed(plan.training.seed + place.rank)
        reference = self._reference(plan, start, device)
        self._roller = Roller(
            plan, self._policy, reference, self._tokenizer, rewards=found, as_json=rows.as_json, length=length
        )
        self._updater = Updater(
            plan.training,
            self._args,
            self._sizes,
            accelerator=self._accelerator,
            model=self._model,
            optimizer=self._optimizer,
            schedule=self._schedule,
        )

    def _prepare(self, plan: Plan, start: Start, device: Device) -> None:
        policy = models.load_model(plan, _policy_start(plan, start), device, self._tokenizer)
        if plan.lora is not None and not hasattr(policy, "peft_config"):
            from peft import get_peft_model

            policy = get_peft_model(policy, models.lora_config(plan))
        if plan.lora is None or plan.lora.dropout is None:
            disable_dropout_in_model(policy)  # else ratios differ from 1 before the first update
        if plan.gradient_checkpointing:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            policy.enable_input_require_grads()
        if policy.generation_config is not None:  # the task's sampling settings apply, not the model's
            policy.generation_config.update(temperature=None, top_p=None, top_k=None)
        self._policy = PolicyWithValue(policy).to(self._accelerator.device)
        optimizer = AdamW(
            trainable(self._policy),
            lr=plan.learning_rate,
            betas=(self._args.adam_beta1, self._args.adam_beta2),
            eps=self._args.adam_epsilon,
            weight_decay=self._args.weight_decay,
        )
        assert isinstance(plan.training, PpoTraining)
        steps = self._total * plan.training.ppo_epochs * self._sizes.steps_a_pass
        warmup = plan.training.warmup_steps
        try:
            self._schedule = get_scheduler(
                self._args.lr_scheduler_type, optimizer, int(warmup if warmup >= 1 else warmup * steps), steps
            )
        except ValueError as error:
            raise BadRequest(f"spec.training.trainer_args.lr_scheduler_type: {error}") from error
        self._model, self._optimizer = self._accelerator.prepare(self._policy, optimizer)

    def _reference(self, plan: Plan, start: Start, device: Device) -> Any:
        """The initial policy; None where it is the policy with its adapter disabled."""
        if plan.lora is not None and start.adapter is None:
            return None
        frozen = models.load_model(plan, start, device, self._tokenizer)
        return frozen.to(self._accelerator.device).eval().requires_grad_(False)

    def train(self) -> None:
        """Run the updates, from the checkpoint on where there is one.

        Raises:
            RunnerError: a reward failed, the checkpoint does not fit, or the loss is no number any more.
        """
        with self._tracking.ended():
            self._train()

    def _train(self) -> None:
        step, history = self._resume()
        if self._tracking.names:
            self._accelerator.init_trackers(
                os.environ.get("WANDB_PROJECT", tracking.PROJECT), init_kwargs=self._tracking.init_kwargs()
            )
            if self._place.leads:
                self._tracking.note()
        tokens = 0.0
        order = Order(self.dataset_size, self._plan.training.seed)
        self._meter.restore(history)
        self._meter.begin(step, self._total)
        training = self._plan.training
        while step < self._total:
            first = step * self.samples_a_step + self._place.rank * self._sizes.update
            chosen = self._rows[order.take(first, self._sizes.update)]
            chosen["ids"] = [prompts.encode(prompt, self._tokenizer) for prompt in chosen["prompt"]]
            with self._accelerator.autocast():
                rollout = self._roller.roll(chosen, self._accelerator.device, self._sizes.forward)
            numbers = self._updater.learn(
                rollout, self._roller.temperature, f"{training.seed}-{step}-{self._place.rank}"
            )
            step += 1
            tokens += numbers.pop("new_tokens")
            numbers |= {"num_tokens": tokens, "learning_rate": self._schedule.get_last_lr()[0]}
            history.append({"step": step, **numbers})
            self._note(step, numbers)
            self._meter.advance(step)
            stopped = self._meter.must_stop()
            if self._saves_at(step) or self._meter.save_due or (stopped is not None and stopped.checkpoint):
                self._save_checkpoint(step, history)
                self._meter.saved(step)
            if stopped is not None:
                break
        if self._tracking.names:
            self._accelerator.end_training()

    def _note(self, step: int, numbers: dict[str, float]) -> None:
        due = step % self._plan.training.logging_steps == 0 or step in (self._meter.first_step + 1, self._total)
        self._meter.log(step, numbers if due else {"train_loss": numbers["loss"], "num_tokens": numbers["num_tokens"]})
        if due:
            self._accelerator.log(numbers, step)
        if due and self._place.leads:
            self._ctx.log.info("step %d of %d: %s", step, self._total, {k: round(v, 4) for k, v in numbers.items()})

    def _saves_at(self, step: int) -> bool:
        training = self._plan.training
        if training.save_strategy == "no":
            return False
        if step == self._total:
            return True
        if training.save_strategy == "epoch":
            before = (step - 1) * self.samples_a_step // self.dataset_size
            return step * self.samples_a_step // self.dataset_size > before
        return step % (training.saves_every or self._plan.kind.save_steps) == 0

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self._policy,
            "tokenizer": self._tokenizer,
            "optimizer": self._optimizer,
            "schedule": self._schedule,
        }

    def _save_checkpoint(self, step: int, history: list[dict[str, float]]) -> None:
        epoch = step * self.samples_a_step / self.dataset_size
        state = {"global_step": step, "max_steps": self._total, "epoch": epoch, "log_history": history}
        folder, keep = checkpoints_dir(self._ctx), self._args.save_total_limit
        ppo_checkpoint.save(folder, self._place, self._accelerator, self._parts(), state=state, keep=keep)

    def _resume(self) -> tuple[int, list[dict[str, float]]]:
        if self.start.resume is None:
            return 0, []
        state = ppo_checkpoint.load(self.start.resume, self._place, self._accelerator, self._parts())
        return int(state["global_step"]), list(state.get("log_history", []))

    def save(self) -> None:
        """Save the policy without the value head."""
        folder = saving.scratch(self._plan, self._ctx)
        if self._place.leads:
            clear(folder)
            self._policy.policy.save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)
            saving.save_generation(self._policy.policy, folder, self._plan)
            saving.publish(folder, self._ctx.out_dir / self._plan.folder)
        self._accelerator.wait_for_everyone()

    def describe(self) -> dict[str, Any]:
        """Metrics of this kind of job."""
        return {
            "epochs": round(self._meter.step * self.samples_a_step / self.dataset_size, 4),
            "sharding": "ddp" if self._place.world > 1 else "none",
            "parameters": sum(weight.numel() for weight in self._policy.parameters()),
            "trainable_parameters": sum(weight.numel() for weight in trainable(self._policy)),
        }


def _policy_start(plan: Plan, start: Start) -> Start:
    """Source of the policy's weights: a resumed run's checkpoint, else the start."""
    if start.resume is None:
        return start
    if plan.lora is not None:
        return Start(weights=start.weights, adapter=start.resume)
    where = "spec.training.resume_from_path"
    return Start(weights=Source(path=str(start.resume), revision=None, shown=start.resume.name, where=where))


def _precision(plan: Plan, device: Device) -> str:
    training = plan.training
    if training.bf16 and training.fp16:
        raise BadRequest("spec.training.fp16: given besides bf16; give one")
    if training.fp16:
        if not device.cuda:
            raise BadRequest("spec.training.fp16: needs a GPU, and this task has none; leave it out")
        return "fp16"
    wanted = device.bf16 if training.bf16 is None else training.bf16
    return "bf16" if wanted else "no"
