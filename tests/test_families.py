"""docs/families.md: every cell of its table is run here, and every refusal in it is what the check says.

``python tests/test_families.py`` runs all cells and prints the page.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from cases import FAMILIES, WITH_EXPERTS, Case
from parity import assert_same_numbers, difference, reference
from test_parity import assert_exact
from transformers import AutoConfig, AutoModelForCausalLM

from cuboid.parallel.errors import FieldError, UserError
from cuboid.parallel.stages import cut_stage
from cuboid.trainer.families import check_family
from cuboid.trainer.model import draw_blueprint, initialise_buffers, seeded_tensors, tensor_plan
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.plans import PROVEN
from cuboid.trainer.recipe import ModelSettings
from cuboid.trainer.shrink import layer_kinds, shrink_config
from cuboid.trainer.weights import from_safetensors

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
MESHES = {"tensor 2": (1, 1, 2), "pipeline 2": (2, 1, 1), "data 2": (1, 2, 1), "2 x 2 x 2": (2, 2, 2)}
"""Title of a column -> pipeline, data, tensor."""
ROWS = {
    "llama": ("Llama", "biases where the config has them"),
    "mistral": ("Mistral", "sliding window"),
    "qwen2": ("Qwen2", "biases of queries, keys and values"),
    "qwen3": ("Qwen3", "norms within heads"),
    "gemma2": ("Gemma 2", "scaled and tied embedding; every other layer slides; attention and logits softly capped"),
    "gemma3": ("Gemma 3, text", "the same without caps; norms within heads; two rotary tables, by kind of layer"),
    "phi3": ("Phi-3", "fused projections *; partial rotary"),
    "smollm3": ("SmolLM3", "every fourth layer without positions; tied"),
    "olmo2": ("OLMo 2", "norms behind each block, and over all heads at once *"),
    "gpt_neox": ("GPT-NeoX, Pythia", "blocks side by side; fused projection by heads; partial rotary; biases"),
    "gpt2": ("GPT-2", "learned positions; transposed weights (Conv1D); fused projection *; biases; tied"),
    "mixtral": ("Mixtral", "experts"),
    "qwen3_moe": ("Qwen3-MoE", "experts, in some layers; norms within heads"),
    "olmoe": ("OLMoE", "experts; norms over all heads at once *"),
    "gpt_oss": ("GPT-OSS", "experts with biases; every other layer slides; attention sinks"),
}
"""Family of `parity.FAMILIES` -> what the page calls it, and what it has that Llama has not."""
WITHOUT_PLAN = {"gpt_oss"}
"""Nobody says what tensor ranks would divide."""
TIED = {"gemma2", "gemma3", "smollm3", "gpt2"}
"""As they are published."""
CELLS = {
    (row, title): Case(*mesh, family=row, tied=row in TIED, expert=mesh[1] * mesh[2] if row in WITH_EXPERTS else 1)
    for row, (title, mesh) in product(ROWS, MESHES.items())
    if row not in WITHOUT_PLAN or mesh[2] == 1
}
OPTIONS = [
    Case(1, 1, 2, family="gpt2", sequence=False),
    Case(1, 2, 2, family="olmo2", sequence=False, shard=False),
    Case(2, 1, 2, "zbv", "gpt2", tied=True),
    Case(2, 1, 2, "interleaved_zero_bubble", "phi3"),
    Case(2, 1, 2, "interleaved_1f1b", "gemma3", tied=True, activation_checkpointing="full"),
    Case(1, 1, 4, family="olmo2"),
]
"""What the page does not show: each peculiarity with what may meet it."""
QUICK = {"gemma2", "phi3", "olmo2", "gpt_neox", "gpt2"}
"""Each with a peculiarity that the cover of test_parity.py does not meet."""
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("cohere", {}),
    ("granite", {"embedding_multiplier": 12.0}),
    ("granite", {"logits_scaling": 8.0}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("gemma3", {}),
    ("gpt_neo", {}),
    ("deepseek_v3", {}),
    ("bloom", {}),
    ("llama4_text", {}),
]
"""Families, with keys of their configs, that compute something else: told before a run starts."""
TENSOR_REFUSED = ["gpt_oss", "stablelm", "apertus"]
"""Families that train on any mesh without tensor ranks, since nobody says what these would divide."""

HEAD = """\
# Families

<!-- Written by `make docs`, which runs every cell; tests/test_families.py holds the words. -->

A family is *proven* on a mesh where tests compare it there with transformers' own model in one process:
loss within 1e-6, gradient norm and every parameter's gradient within 1e-5, none missing, every parameter's update after
three AdamW steps within 2e-4, in float32 with uneven label masks and several documents in a sequence. The weights of
each comparison are read from a folder that `save_pretrained` wrote.
"""
BELOW = """\
\\* Tensor ranks divide the weights and their matrix products; what stands between two of them (attention, Phi-3's gate)
each rank computes whole, as transformers' own plan says: the published layout of the weights is kept, in which a rank's
heads do not lie together, and OLMo 2's norms read all heads.

Experts are divided over all data and tensor ranks of the mesh, balanced by losses and biases: [Experts](experts.md).

Where a config's `vocab_size`, heads or widths do not divide by `parallel.tensor` (GPT-2's 50257), the check says so.

## Others
Every model is tried before a run starts, also a proven family's, whose config may turn more on: a shrunk twin computes
logits through transformers and through stages, in milliseconds, and where they differ the recipe is refused. Families
that pass so and are not in the table are trained, and not proven.

What is refused, for example:

| `model_type` | config | told |
|---|---|---|
"""


def page(found: Mapping[tuple[str, str], str]) -> str:
    """The whole page, with what was found in each cell."""
    lines = [f"| family | `model_type` | beside Llama | {' | '.join(MESHES)} |", "|---" * (3 + len(MESHES)) + "|"]
    for row, (name, beside) in ROWS.items():
        cells = " | ".join(found.get((row, title), "refused: no plan") for title in MESHES)
        lines.append(f"| {name} | `{FAMILIES[row]['model_type']}` | {beside} | {cells} |")
    refused = [f"| `{family}` | {_values(values)} | {refusal(family, values)} |" for family, values in REFUSED]
    refused += [f"| `{family}` | `parallel.tensor: 2` | {tensor_refusal(family)} |" for family in TENSOR_REFUSED]
    return "\n".join([HEAD, *lines, "", BELOW + "\n".join(refused), ""])


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}: {str(value).lower()}`" for key, value in values.items())


def refusal(family: str, values: Mapping[str, Any]) -> str:
    with pytest.raises(FieldError) as told:
        check_family(read_checked_config(ModelSettings(config={"model_type": family, **values})))
    assert told.value.field == "model.model_type"
    return f"{told.value.constraint.partition(' (a small')[0]}; {told.value.remedy.partition(':')[0]}"


def tensor_refusal(family: str) -> str:
    config = AutoConfig.for_model(family)
    check_family(config)
    with pytest.raises(FieldError) as told:
        tensor_plan(draw_blueprint(config))
    assert told.value.field == "parallel.tensor"
    return f"{told.value.constraint}; {told.value.remedy}"


def prove(case: Case, folder: Path) -> None:
    """The mesh against one process, from a folder in Hugging Face's format."""
    expected = reference(case)
    model = AutoModelForCausalLM.from_config(read_checked_config(case.recipe().model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(expected.weights[name])
    model.save_pretrained(folder)
    if case.family in WITH_EXPERTS:
        assert_same_numbers(case, difference(case, folder))
    else:
        assert_exact(case, folder)


def main() -> None:
    found = {}
    for cell, case in CELLS.items():
        print(f"{case}", file=sys.stderr)
        with TemporaryDirectory() as folder:
            try:
                prove(case, Path(folder))
                found[cell] = "proven"
            except AssertionError as error:
                print(error, file=sys.stderr)
                found[cell] = "**differs**"
    print(page(found), end="")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=() if title == "2 x 2 x 2" and row in QUICK else pytest.mark.full)
        for (row, title), case in CELLS.items()
    ],
)
def test_a_family_is_the_same_on_a_mesh(case: Case, tmp_path: Path) -> None:
    prove(case, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_a_family_is_the_same_with_other_options(case: Case) -> None:
    assert_exact(case)


def test_a_folder_of_the_base_model_alone_is_read(tmp_path: Path) -> None:
    """As GPT-2 is published: names without the prefix, and no head."""
    blueprint = draw_blueprint(read_checked_config(Case(family="gpt2", tied=True).recipe().model))
    model = AutoModelForCausalLM.from_config(blueprint.config)
    model.base_model.save_pretrained(tmp_path)
    expected = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in expected.items()}
    copy_into = from_safetensors(tmp_path, shapes=shapes, base="transformer", family="gpt2", stored_names={})
    for name, parameter in expected.items():
        found = torch.empty_like(parameter)
        copy_into(name, tuple(slice(0, size) for size in found.shape), found)
        assert torch.equal(found, parameter), name


def test_the_page_says_what_is_run() -> None:
    assert page(dict.fromkeys(CELLS, "proven")) == PAGE.read_text(), "make docs writes it"
    assert sorted(PROVEN) == sorted({FAMILIES[row]["model_type"] for row in ROWS})


@pytest.mark.parametrize("family", ["gemma", "granite", "olmo3", "starcoder2"])
def test_families_that_stages_compute_exactly(family: str) -> None:
    before = torch.get_rng_state()
    check_family(AutoConfig.for_model(family))
    assert torch.equal(torch.get_rng_state(), before), "the trial must not move the run's random numbers"


def test_a_module_without_a_tensor_role_is_refused_by_name() -> None:
    config = AutoConfig.for_model("apertus", num_hidden_layers=2, hidden_size=32, intermediate_size=32, vocab_size=64)
    with pytest.raises(FieldError, match=r"mlp.act_fn .*; use parallel.tensor=1"):
        tensor_plan(draw_blueprint(config))


def test_a_shrunk_twin_has_layers_of_every_kind() -> None:
    config = AutoConfig.for_model("smollm3")
    small = shrink_config(config, tensor=1, layers=2 * len(layer_kinds(config)))
    assert small.no_rope_layers == [1, 0, 1, 0]
    # longrope has a factor for each pair of features that turns: Phi-4-mini turns three quarters of a head
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "factor": 32.0}
    rope |= {"short_factor": [1.0 + i for i in range(36)], "long_factor": [2.0] * 36}
    check_family(AutoConfig.for_model("phi3", rope_parameters=rope, pad_token_id=None))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_dropout_stands_where_the_family_has_it(family: str) -> None:
    """In one process stages draw what the whole model draws."""
    values = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "attention_dropout"), 0.3)
    config = read_checked_config(Case(family=family).recipe().model)
    for key in values.keys() & vars(config).keys():
        setattr(config, key, values[key])
    blueprint = draw_blueprint(config)
    model = AutoModelForCausalLM.from_config(config).train()
    stage = cut_stage(model, range(6), anatomy=blueprint.anatomy, masks=blueprint.masks)
    ids, positions = torch.arange(12).repeat(2, 1), torch.arange(12).repeat(2, 1)
    torch.manual_seed(1)
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.manual_seed(1)
    assert torch.allclose(stage(ids, position_ids=positions), expected, atol=1e-6)
    assert not torch.allclose(stage(ids, position_ids=positions), expected, atol=1e-2), "nothing is dropped"


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_nobody_sets_is_refused(persistent: bool) -> None:
    blueprint = draw_blueprint(read_checked_config(Case(family="gemma2").recipe().model))
    stage = cut_stage(blueprint.model, range(2), anatomy=blueprint.anatomy, masks=blueprint.masks)
    stage.to_empty(device="cpu")
    initialise_buffers(blueprint, stage)
    assert stage.model.embed_tokens.embed_scale.item() == pytest.approx(32**0.5)
    stage.layers["1"].mlp.register_buffer("scale", torch.ones(1), persistent=persistent)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp \(Gemma2MLP\) has buffers that cannot be rebuilt"):
        initialise_buffers(blueprint, stage)


def test_gpt2_starts_with_less_in_what_writes_into_the_residual_stream() -> None:
    read = seeded_tensors(draw_blueprint(AutoConfig.for_model("gpt2", n_layer=8, n_embd=96)), seed=1)
    for block in ("attn", "mlp"):
        assert read(f"transformer.h.3.{block}.c_proj.weight").std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert read("transformer.h.3.mlp.c_fc.weight").std().item() == pytest.approx(0.02, rel=0.05)


if __name__ == "__main__":
    main()
