"""Results as JSON and as a table that a README can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = {"peer": "TRL", "ours": "temper"}


def write(results: dict[str, Any], folder: Path) -> None:
    """`training-<device>.json` and `.md` in `folder`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(results, indent=1) + "\n"), ("md", markdown(results))):
        target = folder / f"training-{results['device'].split(':')[0]}.{suffix}"
        scratch = target.with_suffix(f".{suffix}.part")
        scratch.write_text(text)
        scratch.replace(target)


def limit(results: dict[str, Any]) -> float:
    """Operations a second of the best product measured: between workloads, so that a busy moment does not lower it."""
    return max(rate for found in results["limits"] for rate in found.values())


def share(results: dict[str, Any], side: dict[str, Any]) -> float:
    """What part of the limit a side reached, counting only the operations that the objective needs."""
    return float(side["operations_per_s"]) / limit(results)


def lines(results: dict[str, Any], name: str) -> str:
    """One workload in a few lines, for the terminal."""
    found, made = results["workloads"][name], []
    for key, title in NAMES.items():
        side = found.get(key, {})
        if "seconds" in side:
            variant = f" ({side['variant']})" if side.get("variant") else ""
            made.append(
                f"  {title}{variant}: {speed(found, side)}, {share(results, side):.0%} of the limit, passes "
                f"{', '.join(f'{value:.1f}' for value in side['passes_s'])} s, warm-up {side['warm_s']:.1f} s"
                + (f", reference {side['reference_s']:.1f} s" if side.get("reference_s") else "") + f", peak {memory(side)}"
            )  # fmt: skip
    if "losses_apart" in found:
        made.append(f"  losses: {found['losses']['peer']} and {found['losses']['ours']}, {found['losses_apart']:.1e} apart")
    made.append(f"  ratio {found['ratio']:.2f}" if "ratio" in found else "  no ratio")
    return "\n".join([*made, *(f"  error: {error}" for error in found["errors"])])


def speed(found: dict[str, Any], side: dict[str, Any]) -> str:
    """Units a second."""
    unit = {"sft": "tokens", "distill": "tokens", "dpo": "pairs", "reward": "pairs", "grpo": "answers"}[found["kind"]]
    return f"{side['units_per_s']:,.{0 if side['units_per_s'] >= 100 else 2}f} {unit}/s"


def memory(side: dict[str, Any]) -> str:
    """Peak memory in GiB."""
    return f"{side['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in side else "–"


def markdown(results: dict[str, Any]) -> str:
    """The table, what it was measured on, and how to read it."""
    machine, rates = results["machine"], ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in results["limit"].items())
    versions = results["peer_versions"] or machine["versions"]
    made = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gib']} GiB"
        + (f", {machine['gpu']}" if "gpu" in machine else "") + f"; {machine['system']}, Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        f"Measured limit: {limit(results) / 1e9:,.0f} billion operations a second in {results['precision']} (at the start: {rates}).",
        "",
        "| Workload | TRL | temper | ratio | target | share of the limit: TRL, temper | target | peak memory: TRL, temper | warm-up: TRL, temper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    made += [row(results, found) for found in results["workloads"].values()]
    made += ["", *notes(results)]
    return "\n".join(made) + "\n"


def row(results: dict[str, Any], found: dict[str, Any]) -> str:
    """One line of the table; what is missing is a dash, what failed is said."""
    sides = [found.get(key, {}) for key in NAMES]
    speeds = [
        f"{speed(found, side)} ±{side['spread'] / 2:.0%}" + (f" ({side['variant']})" if side.get("variant") else "") if "seconds" in side else "–"
        for side in sides
    ]
    ratio = f"**{found['ratio']:.2f}×**" if "ratio" in found else "–"
    shares = ", ".join(f"{share(results, side):.2f}" if "seconds" in side else "–" for side in sides)
    warm = ", ".join(f"{side['warm_s']:.1f} s" if "warm_s" in side else "–" for side in sides)
    wanted = f"≥ {found['target_ratio']:g}×" if found["target_ratio"] else "–"
    part = f"≥ {found['target_share']:.2f}" if found["target_share"] else "–"
    title = found["title"] + "".join(f"<br>{error}" for error in found["errors"])
    return f"| {title} | {speeds[0]} | {speeds[1]} | {ratio} | {wanted} | {shares} | {part} | {', '.join(map(memory, sides))} | {warm} |"


def notes(results: dict[str, Any]) -> list[str]:
    """What the figures are."""
    made = [
        f"Medians of {results['passes']} passes of each side in turn, ± half the spread; tokens are real ones, without padding. A ratio is given only where both "
        "sides said the same losses over the first optimizer steps. DPO counts the reference's log-probs once, as a part of one pass."
    ]
    references = [(found["title"], found) for found in results["workloads"].values() if found.get("ours", {}).get("reference_s") and "training_ratio" in found]
    made += [
        f"{title}: reference {found['peer'].get('reference_s', 0):.1f} s against {found['ours']['reference_s']:.1f} s; without it {found['training_ratio']:.2f}×."
        for title, found in references
    ]
    if linear := results.get("linear"):
        made.append(f"Cost by real tokens: {linear['error']}" if "error" in linear else
                    f"Cost by real tokens: {linear['microseconds_per_token']:.1f} µs a token, "
                    + ", ".join(f"{tokens:,} tokens {seconds:.2f} s" for tokens, seconds in linear["points"])
                    + f"; seconds grow as tokens to the power {linear['power']:.3f} (R² of the straight line {linear['r2']:.4f}).")  # fmt: skip
    if startup := results.get("startup"):
        made.append(f"Start-up: {startup['error']}" if "error" in startup else
                    f"Start-up of a stage, from the start of the process to the end of its first step, tiny model: {startup['seconds']:.1f} s (imports {startup['imports_s']:.1f} s).")  # fmt: skip
    return made
