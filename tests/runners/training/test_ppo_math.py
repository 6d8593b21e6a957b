"""PPO's arithmetic against values worked out by hand."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'training'")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from runners.training import ppo_math  # noqa: E402


def close(found: object, wanted: object) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), atol=1e-6, rtol=1e-5)


def test_log_probabilities_of_tokens() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0]]])  # odds 1:3 and 4:1
    close(ppo_math.token_logprobs(logits, torch.tensor([[1, 1]])), [[math.log(3 / 4), math.log(1 / 5)]])
    close(
        ppo_math.token_logprobs(logits, torch.tensor([[1, 1]]), temperature=0.5), [[math.log(9 / 10), math.log(1 / 17)]]
    )


def test_entropy_in_nats() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3.0)]]])
    close(ppo_math.entropy(logits), [[math.log(2.0), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]])


def test_the_reward_of_each_token() -> None:
    logprobs, reference = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.8, -9.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    found = ppo_math.token_rewards(torch.tensor([3.0]), logprobs, reference, mask, kl_coef=0.1)
    close(found, [[-0.05, 0.02 + 3.0, 0.0]])  # the score on the last token of the response, padding has none


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 7.0]])
    values = torch.tensor([[0.5, 0.5, 0.5], [0.2, 0.4, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    found, returns = ppo_math.advantages(rewards, values, mask, gamma=0.9, lam=0.8)
    # Surprises 0.95, -0.05, 1.5; each advantage is its surprise plus 0.72 of the next. Row two ends after two tokens.
    close(found, [[0.95 + 0.72 * (-0.05 + 0.72 * 1.5), -0.05 + 0.72 * 1.5, 1.5], [0.16 + 0.72 * 0.6, 0.6, 0.0]])
    close(found[0], [1.6916, 1.03, 1.5])
    close(returns, [[2.1916, 1.53, 2.0], [0.792, 1.0, 0.0]])


@given(
    st.lists(st.tuples(st.floats(-5, 5, width=32), st.floats(-5, 5, width=32)), min_size=1, max_size=6),
    st.integers(0, 3),
)
@settings(max_examples=50, deadline=None)
def test_undiscounted_advantages_are_what_is_still_to_come_less_the_value(
    tokens: list[tuple[float, float]], padding: int
) -> None:
    pads = [(99.0, 99.0)] * padding
    rewards, values = (torch.tensor([list(column)]) for column in zip(*tokens, *pads, strict=True))
    mask = torch.tensor([[1.0] * len(tokens) + [0.0] * padding])
    rewards = rewards * mask
    found, returns = ppo_math.advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    to_come = rewards.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(found, (to_come - values) * mask, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(returns, to_come * mask, atol=1e-4, rtol=1e-4)


def test_clipping_holds_back_only_what_would_win() -> None:
    old = torch.zeros(1, 4)
    new = torch.tensor([[1.5, 0.5, 0.9, 5.0]]).log()
    advantage = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    found = ppo_math.policy_loss(new, old, advantage, mask, cliprange=0.2)
    close(found.loss, -1.2 + 0.8 - 0.9)  # cut to 1.2; cut to 0.8; free
    assert int(found.clipped) == 2
    close(found.divergence, sum(r - 1 - math.log(r) for r in (1.5, 0.5, 0.9)))


def test_a_clipped_token_has_no_gradient() -> None:
    new = torch.tensor([[math.log(1.5), math.log(1.1)]], requires_grad=True)
    ones = torch.ones(1, 2)
    ppo_math.policy_loss(new, torch.zeros(1, 2), ones, ones, cliprange=0.2).loss.backward()
    close(new.grad, [[0.0, -1.1]])


def test_the_value_may_not_run_ahead() -> None:
    old, new = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[1.5, 1.1, 9.0]])
    returns, mask = torch.tensor([[2.0, 2.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    found = ppo_math.value_loss(new, old, returns, mask, cliprange=0.2)
    close(found, 0.5 * (0.8**2 + 0.9**2))  # the first counts from 1.2, where it may be


def test_whitening_over_the_tokens_of_all_ranks() -> None:
    values, mask = torch.tensor([[1.0, 2.0], [3.0, 50.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    found = ppo_math.whiten(values, mask, ppo_math.moments(values, mask))
    close(found, [[-1.0, 0.0], [1.0, 0.0]])  # mean 2, variance 1
    shifted = ppo_math.whiten(values, mask, ppo_math.moments(values, mask), shift=False)
    close(shifted, [[1.0, 2.0], [3.0, 0.0]])
    halves = [ppo_math.moments(values[i : i + 1], mask[i : i + 1]) for i in (0, 1)]
    together = ppo_math.Moments(*(a + b for a, b in zip(*halves, strict=True)))
    close(ppo_math.whiten(values[1:], mask[1:], together), [[1.0, 0.0]])
