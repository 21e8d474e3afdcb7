"""Any configuration: a model, or a sentence that names a parameter; the same for published ones."""

import inspect

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_sparse3d import DenseDiT, DenseVAE, SDFRefiner, SDFSignRefiner, SparseDiT, SparseVAE
from diffusers_sparse3d.loaders.original_config import PARAMETERS, convert_config
from tests.models.test_input_checks import SMALL
from tests.properties.strategies import ANYTHING


CLASSES = (DenseDiT, DenseVAE, SparseDiT, SparseVAE, SDFRefiner, SDFSignRefiner)
SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 16, 32]) | ANYTHING


@given(st.sampled_from(CLASSES), st.data())
def test_models(model_class, data):
    names = sorted(inspect.signature(model_class).parameters)
    changed = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    config = {**SMALL[model_class], **{name: data.draw(SIZES) for name in changed}}
    try:
        with torch.device("meta"):
            model = model_class(**config)
    except ValueError as error:
        assert "`" in str(error)
    else:
        assert {name: model.config[name] for name in config} == config


@given(st.sampled_from(sorted(PARAMETERS)), st.data())
def test_published_configurations(model_name, data):
    known = sorted([*PARAMETERS[model_name], "model_channels", "num_heads", "num_head_channels", "nonsense"])
    sizes = st.dictionaries(st.sampled_from(known), SIZES, max_size=len(known))
    try:
        config = convert_config(model_name, data.draw(sizes), {}, "entry")
    except ValueError as error:
        assert "`" in str(error)
    else:
        assert set(config) <= set(inspect.signature(globals()[model_name]).parameters)
