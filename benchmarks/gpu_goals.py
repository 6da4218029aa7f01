"""bench_gpu's figures compared with the goals."""

from typing import Any

__all__ = ["goals"]

_TOWERS = {"ViT-B-32": 0.45, "ViT-L-14": 0.45, "ViT-H-14": 0.6, "ViT-bigG-14": 0.6}  # of the card's largest product
_OVER_COMPILED = 1.1
_OVERLAP, _BANDWIDTH, _MATRIX = 0.8, 0.8, 0.6


def goals(questions: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each goal that the records of questions have figures for: what, by which way, goal, found, reached."""
    results = {name: record["results"][name] for name, record in questions.items() if "results" in record}
    rows = []
    for name, result in results.items():
        if name.startswith("towers "):
            rows += _of_tower(name.removeprefix("towers "), result)
    for way, found in results.get("decode", {}).items():
        if isinstance(found, dict) and "share_of_the_slower" in found:
            what = "end to end, of the slower of decoding and towers"
            rows.append(_row(what, way, _OVERLAP, found["share_of_the_slower"]))
    ranking = results.get("ranking", {})
    for form in ("halves", "quantized"):
        for scan, found in ranking.get(form, {}).items():
            if scan == "scan 1 query":
                rows.append(_row("one query, of the bandwidth", form, _BANDWIDTH, found["share_of_bandwidth"]))
            elif scan.startswith("scan "):
                rows.append(_row(f"{scan}, of the matrix peak", form, _MATRIX, found["share_of_matrix_peak"]))
        if "same as the CPU's" in ranking.get(form, {}):
            rows.append(_row("results as the CPU's", form, 1, int(ranking[form]["same as the CPU's"])))
    return rows


def _of_tower(model: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The best way and batch of ours, and of open_clip compiled."""
    found = [
        (ways[way], way, batch)
        for batch, ways in result.items()
        if batch.startswith("batch ")
        for way in ways
        if "images_a_device_second" in ways[way]
    ]
    ours = [one for one in found if not one[1].startswith("open_clip")]
    if not ours:
        return []
    best, way, batch = max(ours, key=lambda one: one[0]["images_a_device_second"])
    rows = []
    if model in _TOWERS:
        told = f"{model}, of the matrix peak"
        rows.append(_row(told, f"{way}, {batch}", _TOWERS[model], best["share_of_matrix_peak"]))
    if compiled := [one[0]["images_a_device_second"] for one in found if one[1] == "open_clip compiled"]:
        ratio = best["images_a_device_second"] / max(compiled)
        rows.append(_row(f"{model}, times open_clip compiled", f"{way}, {batch}", _OVER_COMPILED, round(ratio, 3)))
    return rows


def _row(what: str, way: str, goal: float, found: float) -> dict[str, Any]:
    return {"what": what, "way": way, "goal": goal, "found": found, "reached": found >= goal}
