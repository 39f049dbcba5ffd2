"""What even rows cost in orthogonality: Muon, NorMuon, U-NorMuon and Aurora on matrices of uneven rows.

    python -m studies.orthogonality [--quick -o FOLDER]

Rows are |1 + s z| times a Gaussian row, z normal, s the spread. The paper (arXiv 2606.27715, figure 3) has a defect
near .06 at spread 3 for unit rows after Muon, on 512x128.
"""

import sys

import torch
from matplotlib.figure import Figure
from torch import Tensor

from aurora import balanced_polar, cans_polar, jordan_polar, normuon, orthogonality_defect, row_norm_cv, u_normuon
from studies import parse, publish, style

M, N, STREAM = 512, 128, 20
ROUTINES = {"quintic-5, bf16": jordan_polar, "CANS-12, fp32": cans_polar}


def uneven(spread: float, seeds: int) -> Tensor:
    """(STREAM, seeds, M, N): fresh Gaussian rows at every step, with factors that stay."""
    generator = torch.Generator().manual_seed(0)
    factors = (1 + spread * torch.randn(seeds, M, 1, generator=generator)).abs()
    return factors * torch.randn(STREAM, seeds, M, N, generator=generator)


def directions(stream: Tensor, polar) -> dict[str, Tensor]:
    """What each makes of the last matrix of the stream: NorMuon as its first, and after all the earlier ones."""
    factors = polar(stream)
    last = factors[-1]
    second_moment = torch.zeros(*stream.shape[1:3], 1)
    first, _ = normuon(last, second_moment)
    for U in factors:
        running, second_moment = normuon(U, second_moment)
    return {"Muon": last.float(), "NorMuon, step 1": first, f"NorMuon, step {STREAM}": running,
            "U-NorMuon": u_normuon(last), "Aurora": balanced_polar(stream[-1], polar=polar).float()}


def measure(spreads: list[float], seeds: int) -> list[dict]:
    rows = []
    for spread in spreads:
        stream = uneven(spread, seeds)
        for routine, function in ROUTINES.items():
            for name, U in directions(stream, function).items():
                defect = orthogonality_defect(U)
                rows.append({"spread": spread, "direction": name, "polar": routine, "defect F/n": defect.mean().item(),
                             "lowest": defect.min().item(), "highest": defect.max().item(),
                             "row norm CV": row_norm_cv(U).mean().item()})
    return rows


def draw(rows: list[dict]) -> Figure:
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    names = list(dict.fromkeys(row["direction"] for row in rows))
    panels = figure.subplots(1, 3)
    for axes, routine, key in zip(panels, [*ROUTINES, "CANS-12, fp32"], ["defect F/n", "defect F/n", "row norm CV"]):
        for i, name in enumerate(names):
            mine = [row for row in rows if (row["direction"], row["polar"]) == (name, routine)]
            axes.plot([row["spread"] for row in mine], [row[key] for row in mine], label=name, **style(i, len(names)))
        axes.set(xlabel="spread of the input's rows", title=routine)
        axes.set_ylabel("||U$^T$U - I||$_F$ / n" if key == "defect F/n" else "CV of the result's row norms")
        axes.grid(alpha=0.3)
    panels[0].axhline(0.06, color="grey", linewidth=1)
    panels[0].text(0.02, 0.0605, "paper: .06 at spread 3", fontsize=8)
    panels[2].legend()
    return figure


def main(words: list[str]):
    args = parse("orthogonality", __doc__, words)
    rows = measure([0.0, 1.5, 3.0] if args.quick else [0.5 * i for i in range(7)], seeds=2 if args.quick else 5)
    seen = {(row["direction"], row["polar"], row["spread"]): row["defect F/n"] for row in rows}
    quintic, cans = ROUTINES
    aurora = [defect for (name, routine, _), defect in seen.items() if (name, routine) == ("Aurora", cans)]

    def at(direction, routine):
        return f"{seen[direction, routine, 3]:.3g}"

    summary = [row for row in rows if row["spread"] in (0, 1.5, 3)]
    publish("orthogonality", args, rows, draw(rows), f"""
        The paper's figure 3 has a defect near .06 at spread 3 where rows are normalised after Muon's polar factor; its
        generator of matrices is not stated where we could read it, and rows |1 + s z| times a Gaussian are our reading.
        At spread 3, ||U^T U - I||_F / n on quintic-5 is {at('NorMuon, step 1', quintic)} for NorMuon's first step,
        {at(f'NorMuon, step {STREAM}', quintic)} for its step {STREAM} in a stream of fresh matrices whose row factors
        stay, {at('U-NorMuon', quintic)} for U-NorMuon and {at('Muon', quintic)} for Muon; on CANS-12
        {at('NorMuon, step 1', cans)}, {at(f'NorMuon, step {STREAM}', cans)}, {at('U-NorMuon', cans)} and
        {at('Muon', cans)}. Aurora's defect is that of its polar routine at every spread,
        {min(aurora):.1e} to {max(aurora):.1e} on CANS-12: scaling its input's rows does not change its result, so this
        input is easy for it. studies/alignment.py has momentum of a training run.""", summary)


if __name__ == "__main__":
    main(sys.argv[1:])
