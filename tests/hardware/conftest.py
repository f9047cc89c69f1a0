"""A small cluster described by its owner: a system file, and beside it the card and the network it names."""

from __future__ import annotations

from pathlib import Path

import pytest

SYSTEM = """\
kind: system
name: lab
accelerator: card.yaml
node:
  gpus: {value: 2, unit: count, basis: measured, source: counted}
  nics: {value: 1, unit: count, basis: measured, source: counted}
  nic_bandwidth: {value: 100, unit: Gbps, basis: vendor, source: NIC datasheet}
scaleup:
  link: pcie4
  fabric: pcie-box
  domain_gpus: {value: 2, unit: count, basis: measured, source: counted}
  bandwidth: {value: 31.5, unit: GB/s, basis: vendor, source: PCIe 4.0}
scaleout:
  link: ethernet
  fabric: tree.yaml
  bandwidth: {value: 12.5, unit: GB/s, basis: vendor, source: NIC datasheet}
max_nodes: {value: 16, unit: count, basis: measured, source: counted}
"""
TREE = """\
kind: fabric
topology: fat-tree
name: tree
rail_optimised: false
switch_ports: {value: 8, unit: count, basis: measured, source: counted}
leaf:
  nodes: {value: 4, unit: count, basis: measured, source: counted}
  oversubscription: {value: 2, unit: ratio, basis: measured, source: counted}
pod:
  nodes: {value: 8, unit: count, basis: measured, source: counted}
  oversubscription: {value: 4, unit: ratio, basis: measured, source: counted}
"""
CARD = """\
kind: accelerator
name: card
vendor: ACME
memory: {value: 80, unit: GiB, basis: vendor, source: ACME datasheet}
memory_bandwidth: {value: 2, unit: TB/s, basis: vendor, source: ACME datasheet}
peak_flops: {bf16: {value: 300, unit: TFLOP/s, basis: vendor, source: ACME datasheet}}
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """The system file of 2-GPU nodes on a tapered network of 4-node leaves and 8-node pods."""
    (tmp_path / "tree.yaml").write_text(TREE)
    (tmp_path / "card.yaml").write_text(CARD)
    path = tmp_path / "lab.yaml"
    path.write_text(SYSTEM)
    return path
