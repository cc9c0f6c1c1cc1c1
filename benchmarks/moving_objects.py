"""How often a turntable whose object moves is told from one whose object only turns.

    python benchmarks/moving_objects.py --meshes DIR --split validation --out out/moving_objects
    python benchmarks/moving_objects.py --meshes DIR --split test --out out/moving_objects

Each mesh is rendered from 16 azimuths at 64 px: at rest, and with a part that swings or slides while the
camera goes round. The part is drawn by the mesh's number: what is below a plane, its two halves against each
other as legs go; what is above one; what is on one side of one; or a piece that hangs together. It goes to
and fro one to three times in an orbit. Views at rest also come with noise and without alpha, and both kinds
disagree as generated ones do (`perturbed_views`). --generated adds views that a model drew of objects at
rest, such as the views_0 that `im3d batch --save-views` writes.

The statistic is that of `quality.rigidity_gate`. The table says how often the gate's own threshold finds each
kind, and how often the bound does that 5% of the views at rest, generated ones aside, exceed. Results stay in
--out, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import perturbed_views
from jaxtyping import Float
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial.transform import Rotation

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.parts import Mesh
from im3d_jax.data.meshes.reading import load_mesh
from recon_torch.files import write_json
from recon_torch.fit.quality import rigidity_gate
from recon_torch.settings import GateSettings
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.directory import Views, load_views
from recon_torch.views.masks import by_backdrop
from recon_torch.views.rigidity import excursions

NUM_VIEWS, SIZE_PX, ELEVATIONS_DEG = 16, 64, (0.0, 40.0)
MOST_CYCLES = 3
LEAST_PART, LARGEST_PART = 0.05, 0.5  # shares of the corners that a piece may have
NOISE = 5 / 255
AT_REST = ("at rest", "at rest, noise", "at rest, disagreeing")
GENERATED = "generated"
FALSE_ALARMS = 0.05


class Part(NamedTuple):
    """What moves. which: of each corner 1, -1 (the other way) or 0. The hinge is a point and an axis."""

    name: str
    which: Float[np.ndarray, "F 3"]
    point: Float[np.ndarray, "3"]
    axis: Float[np.ndarray, "3"]
    way: Float[np.ndarray, "3"]  # in which it slides


class Motion(NamedTuple):
    """By how many degrees a part swings, or by which share of the object's size it slides."""

    kind: str
    amount: float

    def __str__(self) -> str:
        unit = " degrees" if self.kind == "swings" else "%"
        return f"{self.kind} by {self.amount:g}{unit}"


MOTIONS = [Motion("swings", amount) for amount in (5, 10, 20)]
MOTIONS += [Motion("slides", amount) for amount in (3, 6, 12)]


def draw_part(mesh: Mesh, generator: np.random.Generator) -> Part:
    """One of the parts of a mesh."""
    low, high = mesh.corners.min((0, 1)), mesh.corners.max((0, 1))
    middle, size = (low + high) / 2, high - low
    long, wide = (0, 1) if size[0] > size[1] else (1, 0)
    x, y, z = np.eye(3)
    along, across = np.eye(3)[long], np.eye(3)[wide]
    hip, neck, head = low[2] + 0.4 * size[2], low[2] + 0.6 * size[2], low[long] + 0.65 * size[long]
    sides = np.sign(mesh.corners[..., wide] - middle[wide])
    parts = [
        Part("legs", (mesh.corners[..., 2] < hip) * sides, np.array([*middle[:2], hip]), across, along),
        Part("top", mesh.corners[..., 2] > neck + 0 * sides, np.array([*middle[:2], neck]), across, along),
        Part(
            "side", mesh.corners[..., long] > head + 0 * sides, middle + (head - middle[long]) * along, z, z
        ),
    ]
    piece = _piece(mesh, generator)
    if piece is not None:
        places = mesh.corners[piece]
        nearest = places[np.linalg.norm(places - middle, axis=-1).argmin()]
        axis, way = Rotation.random(2, random_state=generator).apply(x)
        parts += [Part("piece", piece, nearest, axis, way)] * 2
    part = parts[generator.integers(len(parts))]
    return part._replace(which=part.which.astype(np.float32))


def _piece(mesh: Mesh, generator: np.random.Generator) -> np.ndarray | None:
    """The corners of a piece that hangs together and is neither too small nor the most of the mesh."""
    _, place = np.unique(mesh.corners.reshape(-1, 3).round(5), axis=0, return_inverse=True)
    triangles = place.reshape(-1, 3)
    ends = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]]]).T
    count = triangles.max() + 1
    _, label = connected_components(coo_matrix((np.ones(ends.shape[1]), ends), (count, count)), False)
    label = label[triangles[:, 0]]
    areas = np.linalg.norm(np.cross(*(mesh.corners[:, 1:] - mesh.corners[:, :1]).transpose(1, 0, 2)), axis=-1)
    shares = np.bincount(label, areas) / areas.sum()
    fit = np.flatnonzero((shares > LEAST_PART) & (shares < LARGEST_PART))
    return None if not len(fit) else np.repeat((label == generator.choice(fit))[:, None], 3, 1)


def moved(mesh: Mesh, part: Part, motion: Motion, share: float) -> Mesh:
    """The mesh at one moment. share: of the motion's amount, from -1 to 1."""
    corners, normals = mesh.corners.copy(), mesh.normals.copy()
    for sign in (1, -1):
        chosen = part.which == sign
        if motion.kind == "slides":
            corners[chosen] += sign * share * motion.amount / 100 * part.way
            continue
        turn = Rotation.from_rotvec(sign * share * np.radians(motion.amount) * part.axis)
        corners[chosen] = turn.apply(corners[chosen] - part.point) + part.point
        normals[chosen] = turn.apply(normals[chosen])
    return mesh._replace(corners=corners.astype(np.float32), normals=normals.astype(np.float32))


def turntable(mesh: Mesh, cameras: Cameras, part: Part, motion: Motion | None, seed: int) -> Views:
    """Views of a mesh, whose part moves unless there is no motion."""
    generator = np.random.default_rng([seed, 1])
    cycles, phase = generator.integers(1, MOST_CYCLES + 1), generator.uniform(0, 2 * np.pi)
    turns = np.sin(cycles * np.arange(len(cameras)) / len(cameras) * 2 * np.pi + phase)
    if motion is None:
        rgba, _ = mesh_rendering.render(mesh, cameras)
    else:
        rgba = np.concatenate(
            [
                mesh_rendering.render(moved(mesh, part, motion, turn), cameras[view])[0]
                for view, turn in enumerate(turns)
            ]
        )
    images = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    return Views(cameras, images, rgba[..., 3:], [f"{view:03d}.png" for view in range(len(cameras))], [])


def cases(mesh: Mesh, seed: int) -> dict[str, Views]:
    """The turntables of a mesh, by what they are called."""
    generator = np.random.default_rng([seed, 0])
    elevation_rad = float(np.radians(generator.uniform(*ELEVATIONS_DEG)))
    cameras, part = orbit(NUM_VIEWS, elevation_rad, SIZE_PX), draw_part(mesh, generator)
    still = turntable(mesh, cameras, part, None, seed)
    noise = np.random.default_rng(seed).normal(0, NOISE, still.images.shape)
    noisy = by_backdrop((still.images + noise).clip(0, 1).astype(np.float32))
    made = [still, dataclasses.replace(still, masks=noisy.masks), perturbed_views.perturb(still, seed)]
    found = dict(zip(AT_REST, made, strict=True))
    for motion in MOTIONS:
        moving = turntable(mesh, cameras, part, motion, seed)
        found[str(motion)] = moving
        found[f"{motion}, disagreeing"] = perturbed_views.perturb(moving, seed)
    return found


def main() -> None:
    flags = _parse()
    names = json.loads((flags.meshes / "split.json").read_text())[flags.split]
    rows: list[tuple[str, float]] = []
    for seed in range(0, len(names), flags.every):
        file = flags.out / flags.split / f"{names[seed].replace('/', '-')}.json"
        if not file.is_file():
            views = cases(load_mesh(flags.meshes / f"{names[seed]}.glb"), seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {case: _motion(each) for case, each in views.items()})
        rows += json.loads(file.read_text()).items()
        print(file.stem, flush=True)
    rows += [(GENERATED, _motion(load_views(path))) for path in flags.generated]
    print("\n" + _table(rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--meshes", type=Path, required=True, metavar="DIR", help="has .glb files and a split.json")
    add("--split", default="validation", help="of split.json")
    add("--every", type=int, default=2, metavar="N", help="take one mesh in N (default: 2)")
    add("--generated", type=Path, nargs="+", default=[], metavar="DIR", help="directories of generated views")
    add("--out", type=Path, default=Path("out/moving_objects"), metavar="DIR")
    return parser.parse_args()


def _motion(views: Views) -> float:
    assert views.masks is not None
    return rigidity_gate(excursions(views.cameras, views.masks), GateSettings())[0]["motion"]


def _table(rows: list[tuple[str, float]]) -> str:
    by_case: dict[str, list[float]] = {}
    for case, motion in rows:
        by_case.setdefault(case, []).append(motion)
    at_rest = np.concatenate([by_case[case] for case in AT_REST])
    gate, bound = GateSettings().view_motion, np.quantile(at_rest, 1 - FALSE_ALARMS, method="higher")
    lines = [
        f"| case | count | median | above {gate:.1%}, the gate | above {bound:.1%} |",
        "|---|--:|--:|--:|--:|",
    ]
    for case, values in by_case.items():
        found = [f"{np.mean(np.array(values) > each):.0%}" for each in (gate, bound)]
        lines.append(f"| {case} | {len(values)} | {np.median(values):.1%} | {' | '.join(found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
