"""What the answers come to: win rates with intervals, consensus, agreement, who is left out (Fig. 5, A.2)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from im3d_jax.evaluate.outputs.names import named
from im3d_jax.intervals import bootstrap
from im3d_jax.study import LEFT, SIDES
from im3d_jax.study.extra import needed
from im3d_jax.study.plan import Item, Study
from im3d_jax.study.store import Answer
from recon_torch.errors import UserError


@dataclass(frozen=True)
class Rules:
    """How results are computed.

    Attributes:
        min_passed: the share of checks that annotators must get right, or all of their answers are left out.
        num_resamples: of the bootstrap over prompts. seed: of it.
    """

    min_passed: float = 0.8
    num_resamples: int = 10_000
    seed: int = 0


def compute(study: Study, answers: Sequence[Answer], rules: Rules) -> dict[str, Any]:
    """The content of results.json. Raises UserError if no answer to an item is left."""
    if not answers:
        raise UserError("there are no answers yet; run `im3d study serve` or `im3d study import`")
    if strange := [answer.item for answer in answers if answer.item not in study.by_id]:
        raise UserError(
            f"the database has answers to {named(sorted(set(strange)), 'item')} that the study does not have;"
            " give the database that its own commands wrote"
        )
    annotators = {name: _annotator(study, of, rules) for name, of in _by_annotator(answers).items()}
    excluded = {name: told["reason"] for name, told in annotators.items() if told["reason"]}
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        if answer.annotator not in excluded and not study.by_id[answer.item].is_check:
            counted[answer.item][answer.choice] += 1
    if not counted:
        raise UserError(
            f"there are {len(answers)} answers, and no annotator is left who has answered "
            f"a question and {rules.min_passed:g} of the checks; wait, or give --min-passed"
        )
    items = [_item(study, item, counted[item.id]) for item in study.items]
    num_answers = [sum(counted[item.id].values()) for item in study.items]
    return {
        "study": study.digest,
        "seed": study.seed,
        "rules": {
            "exclusion": f"annotators with less than {rules.min_passed:g} of their checks right",
            "interval": f"95%, percentiles of {rules.num_resamples} resamples of the prompts",
            "bootstrap_seed": rules.seed,
        },
        "num_answers": sum(num_answers),
        "num_check_answers": sum(study.by_id[answer.item].is_check for answer in answers),
        "num_answers_excluded": sum(
            answer.annotator in excluded and not study.by_id[answer.item].is_check for answer in answers
        ),
        "num_items": len(study.items),
        "answers_per_item": {str(n): count for n, count in sorted(Counter(num_answers).items())},
        "num_annotators": len(annotators),
        "num_annotators_without_checks": sum(not told["num_checks"] for told in annotators.values()),
        "excluded": excluded,
        "comparisons": _comparisons(study, counted, rules),
        "agreement": {
            name: _agreement([counted[item.id] for item in study.items if name in ("all", item.question)])
            for name in ("all", *study.questions)
        },
        "left_share": _left_share(counted),
        "annotators": annotators,
        "items": items,
        "left_out": study.left_out,
    }


def _by_annotator(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    found: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        found[answer.annotator].append(answer)
    return dict(sorted(found.items()))


def _annotator(study: Study, answers: Sequence[Answer], rules: Rules) -> dict[str, Any]:
    """Counts, and the reason for leaving the annotator out, or ""."""
    checks = [answer for answer in answers if study.by_id[answer.item].is_check]
    passed = sum(answer.choice == study.by_id[answer.item].correct for answer in checks)
    seconds = [answer.seconds for answer in answers if answer.seconds is not None]
    is_out = bool(checks) and passed / len(checks) < rules.min_passed
    return {
        "num_answers": len(answers) - len(checks),
        "num_checks": len(checks),
        "num_checks_passed": passed,
        "median_seconds": float(np.median(seconds)) if seconds else None,
        "reason": f"{passed} of {len(checks)} checks right" if is_out else "",
    }


def _item(study: Study, item: Item, counts: Mapping[str, int]) -> dict[str, Any]:
    """The votes on an item and their majority: a method, "tie", or None without answers."""
    methods = dict(zip(SIDES, study.methods_of(item), strict=True))
    votes = {methods[side]: counts.get(side, 0) for side in SIDES}
    most = max(votes.values())
    leading = [method for method, count in votes.items() if count == most]
    consensus = None if not most else leading[0] if len(leading) == 1 else "tie"
    prompt = study.prompts[item.prompt].text
    return {
        "item": item.id,
        "prompt": prompt,
        "question": item.question,
        "votes": votes,
        "consensus": consensus,
    }


def _left_share(counted: Mapping[str, Counter[str]]) -> float:
    """The share of answers "left", which is about a half because sides are drawn."""
    return sum(c[LEFT] for c in counted.values()) / sum(sum(c.values()) for c in counted.values())


# ---- Win rates ----


def _comparisons(study: Study, counted: Mapping[str, Counter[str]], rules: Rules) -> list[dict[str, Any]]:
    """For each pair of methods and question, how often the first method is preferred."""
    found = []
    for first, second in study.pairs:
        for question in study.questions:
            items = [
                item
                for item in study.items
                if item.question == question and set(study.methods_of(item)) == {first, second}
            ]
            votes = [
                (counts[SIDES[study.methods_of(item).index(first)]], sum(counts.values()))
                for item in items
                if (counts := counted.get(item.id))
            ]
            found.append({"first": first, "second": second, "question": question, **_rate(votes, rules)})
    return found


def _rate(votes: Sequence[tuple[int, int]], rules: Rules) -> dict[str, Any]:
    """Of the (votes for the first method, votes) of each prompt.

    The win rate is the mean over prompts of the share of votes; by consensus, that of the prompts that most
    annotators give to the first method, where a tie counts one half.
    """
    if not votes:
        return {"num_prompts": 0, "num_answers": 0, "win_rate": None, "interval": None, "consensus": None}
    wins, totals = np.array(votes, np.float64).T
    shares = wins / totals
    outcomes = np.where(shares > 0.5, 1.0, np.where(shares < 0.5, 0.0, 0.5))
    return {
        "num_prompts": len(votes),
        "num_answers": int(totals.sum()),
        "win_rate": float(shares.mean()),
        "interval": bootstrap(shares, rules.num_resamples, rules.seed),
        "consensus": {
            "won": int((shares > 0.5).sum()),
            "tied": int((shares == 0.5).sum()),
            "lost": int((shares < 0.5).sum()),
            "win_rate": float(outcomes.mean()),
            "interval": bootstrap(outcomes, rules.num_resamples, rules.seed),
        },
    }


# ---- Agreement ----


def _agreement(counted: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Krippendorff's alpha, Fleiss' kappa, and the share of pairs of answers to an item that are equal.

    The values are the sides, not the methods: which side a method is on is drawn, so that a method that
    always wins does not count as agreement by chance.
    """
    table = np.array([[counts.get(side, 0) for side in SIDES] for counts in counted], np.int64).reshape(-1, 2)
    table = table[table.sum(1) > 1]  # one answer agrees with nobody
    same = (table * (table - 1)).sum()
    pairs = (table.sum(1) * (table.sum(1) - 1)).sum()
    return {
        "num_items": len(table),
        "krippendorff_alpha": _alpha(table),
        "fleiss_kappa": fleiss_kappa(table),
        "equal_pairs": float(same / pairs) if len(table) else None,
    }


def _alpha(table: Int[np.ndarray, "N 2"]) -> float | None:
    """None where all answers are one side, for which it is not defined."""
    if (table.sum(0) == 0).any():
        return None
    krippendorff = needed("krippendorff")
    return float(krippendorff.alpha(value_counts=table, level_of_measurement="nominal"))


def fleiss_kappa(table: Int[np.ndarray, "N C"]) -> float | None:
    """Fleiss' kappa (Psychological Bulletin 76, 1971) of the numbers of answers by item and category.

    Every item needs two answers or more. Fleiss asks for equally many to each; where they differ, each item
    counts alike (Gwet, Handbook of Inter-Rater Reliability, 2014). Returns None where all answers are of one
    category, or there are none, for which it is not defined.
    """
    if np.count_nonzero(table.sum(0)) < 2:
        return None
    totals = table.sum(1)
    agreed = ((table * (table - 1)).sum(1) / (totals * (totals - 1))).mean()
    by_chance = ((table / totals[:, None]).mean(0) ** 2).sum()
    return float((agreed - by_chance) / (1 - by_chance))


# ---- The screen ----


def screen(results: Mapping[str, Any]) -> str:
    """The results in a few lines."""
    lines = []
    for each in results["comparisons"]:
        name = f"{each['first']} against {each['second']}, {each['question']}:"
        if each["win_rate"] is None:
            lines.append(f"{name} no answers yet")
            continue
        low, high = each["interval"]
        outcomes = each["consensus"]
        lines.append(
            f"{name} preferred in {each['win_rate']:.1%} [{low:.1%}, {high:.1%}]"
            f" of {each['num_answers']} answers on {each['num_prompts']} prompts; by majority"
            f" {outcomes['won']} won, {outcomes['tied']} tied, {outcomes['lost']} lost"
        )
    agreement = results["agreement"]["all"]
    if agreement["fleiss_kappa"] is None:
        lines.append("agreement: not defined, as no item has two answers or all are one side")
    else:
        alpha, kappa = agreement["krippendorff_alpha"], agreement["fleiss_kappa"]
        lines.append(f"agreement: Krippendorff's alpha {alpha:.2f}, Fleiss' kappa {kappa:.2f}")
    counts = ", ".join(f"{count} with {number}" for number, count in results["answers_per_item"].items())
    lines.append(f"items by their numbers of answers: {counts}")
    for name, reason in results["excluded"].items():
        lines.append(f"left out: {name} ({reason})")
    if results["excluded"]:
        lines.append(f"{results['num_answers_excluded']} answers of theirs are left out")
    if results["num_annotators_without_checks"]:
        lines.append(f"{results['num_annotators_without_checks']} annotators have met no check, and count")
    return "\n".join(lines)
