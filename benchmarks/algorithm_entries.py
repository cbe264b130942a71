"""What `benchmarks/algorithms.py` runs: one entry a line of its table, as overrides of the demo recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table.

    Attributes:
        overrides: of `recipes/demo.py`, as on the command line. `{start}` is the folder of the seed's fine-tuned
            model, `{trained}` that of the model that the entry `after` ended with, `{recorded}` that of the run that
            `record` describes.
        settings: what was chosen, and why, where it is not the method's default.
        should_not_learn: why it should not; empty for one that should.
        after: name of an entry that has to be trained first.
        record: overrides of a run whose log is trained on; it comes first, in the same process, and its cost counts.
    """

    overrides: tuple[str, ...]
    settings: str = "defaults"
    should_not_learn: str = ""
    after: str = ""
    record: tuple[str, ...] = ()


SHARED = (
    "model.scratch=none",
    "warm_start=none",
    "steps=12",
    "train.optimizer.warmup_steps=3",
    "evaluation.every=0",
    "evaluation.samples=1",
    "evaluation.show=0",
    "checkpoint.every=0",
    "obs.live=false",
    "obs.tensorboard=false",
)
"""What all runs have in common: the demo's optimizer (Adam, 8e-4, falling to a tenth), batch and sampling.

At lag 0 with one update a batch the embedded engine's log-probs are the trainer's, every ratio is 1, and methods that
differ in what they do with ratios are the same method. Those have two updates a batch, or a lag of two steps, here.
"""

_LAG = 'data.gate={max_lag=2, order="dispatch"}'
_LAG_OF_TWO_BATCHES = 'data.gate={max_lag=4, order="dispatch", on_stale="mask_tokens"}'
_TWO = "two updates a batch"


def _algorithm(kind: str, *fields: str) -> str:
    return "algorithm={" + ", ".join([f'type="{kind}"', *fields]) + "}"


ENTRIES: dict[str, Entry] = {
    "grpo": Entry((_algorithm("grpo"),)),
    "grpo_sample_std": Entry(
        (_algorithm("grpo", 'std="sample"', 'normaliser="token"'),), "sample deviation, per token"
    ),
    "dr_grpo": Entry((_algorithm("dr_grpo"),), "constant length 30, the limit of an answer"),
    "rloo": Entry((_algorithm("rloo"),)),
    "reinforce_pp": Entry((_algorithm("reinforce_pp"),)),
    "reinforce_pp_baseline": Entry((_algorithm("reinforce_pp_baseline"),)),
    "dapo": Entry(
        (_algorithm("dapo", "updates_per_batch=2"), 'data.filters=[{type="spread"}]'),
        f"dynamic sampling by the spread filter; {_TWO}",
    ),
    "gspo": Entry((_algorithm("gspo", "updates_per_batch=2"),), _TWO),
    "cispo": Entry((_algorithm("cispo", "updates_per_batch=2"),), _TWO),
    "icepop": Entry((_algorithm("icepop"), _LAG), "lag 2"),
    "decoupled_ppo": Entry((_algorithm("decoupled_ppo", "updates_per_batch=2"), _LAG_OF_TWO_BATCHES), f"{_TWO}, lag 4"),
    "decoupled_ppo_interpolated": Entry(
        (_algorithm("decoupled_ppo", 'proximal="interpolated"'), _LAG), "lag 2; proximal without a pass of its own"
    ),
    "dis": Entry((_algorithm("dis"), _LAG), "lag 2"),
    "ppo": Entry(
        (_algorithm("ppo", "updates_per_batch=2", "critic={optimizer={lr=2e-3, betas=[0.9, 0.99]}, updates=2}"),),
        f"{_TWO}; critic Adam 2e-3, two updates for each of the policy",
    ),
    "opd": Entry(
        (_algorithm("opd", 'teacher="taught"'), 'teachers=[{name="taught", path="{trained}"}]'),
        "the teacher is what grpo ended with; rewards are not looked at",
        after="grpo",
    ),
    "dpo": Entry(
        (
            'preferences={pairs={type="run", path="{recorded}"}, steps=50, batch=32, beta=1.0, train={optimizer='
            '{lr=1e-4, betas=[0.9, 0.99], warmup_steps=3, schedule="linear", final_lr_ratio=0.1}}}',
            "steps=0",
        ),
        "best against worst of 384 groups of the start model, as many answers as the others sample; beta 1, Adam 1e-4",
        record=("steps=1", "groups_per_step=384"),
    ),
    "grpo_lag": Entry((_algorithm("grpo"), _LAG), "lag 2, no correction but the clip"),
    "grpo_tis": Entry((_algorithm("grpo", "tis={}"), _LAG), "lag 2"),
    "grpo_masks": Entry(
        (_algorithm("grpo", "sequence_mask={low=0.9, high=1.1}", "veto={low=0.01, high=100}"), _LAG),
        "lag 2; bounds wider than the defaults, which are for one version in two engines",
    ),
    "grpo_kl_k1_reward": Entry(
        (_algorithm("grpo", 'kl={coefficient=0.01, where="reward", estimator="k1"}'),), "KL 0.01 in the reward"
    ),
    "grpo_kl_k2_loss": Entry(
        (_algorithm("grpo", 'kl={coefficient=0.01, where="loss", estimator="k2"}'),), "KL 0.01 in the loss"
    ),
    "grpo_kl_k3_loss": Entry(
        (_algorithm("grpo", 'kl={coefficient=0.01, where="loss", estimator="k3"}'),), "KL 0.01 in the loss"
    ),
    "grpo_random_reward": Entry(
        (_algorithm("grpo"), 'rewards=[{type="random"}]'),
        "the reward is a coin",
        "the reward says nothing of the answer",
    ),
}
