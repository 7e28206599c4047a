"""A densified module goes to ONNX as any plain one does."""

from pathlib import Path

import numpy as np
import onnx.reference
import pytest
import torch

import topkast_func as tk
from tests.facade.networks import Case, each_case


@each_case
@pytest.mark.filterwarnings("ignore")  # the exporter warns of itself, and traces with warnings
def test_a_densified_module_computes_the_same_in_onnx(case: Case, tmp_path: Path) -> None:
    model = case.make()
    tk.sparsify(model, case.config)
    inputs = case.inputs()
    expected = model.eval()(inputs).detach().numpy()
    file = tmp_path / "model.onnx"
    tk.densify(model)
    torch.onnx.export(model, (inputs,), file, input_names=["inputs"], dynamo=False)
    (found,) = onnx.reference.ReferenceEvaluator(str(file)).run(None, {"inputs": inputs.numpy()})
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-6)
