"""The report: its figures against closed forms, its refusals in one sentence, its respect for the user's own errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from functional_hess.__main__ import main
from functional_hess.report import Problem, ReportError, as_table, digits_problem, load_problem, model_report, require_extras

PROBLEMS = '''
import torch

# H = diag(3, -1, 0, 2) in w and 4 in b, with 0.5 between b and w[1].
D = torch.diag(torch.tensor([3.0, -1.0, 0.0, 2.0], dtype=torch.float64))


def quadratic():
    def f(x, shift):
        w = x["w"] - shift
        return w @ D @ w / 2 + 2 * x["b"] ** 2 + 0.5 * x["b"] * w[1]

    x = {"w": torch.ones(4, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64), "name": "q", "none": None}
    return f, x, (torch.full((4,), 0.5, dtype=torch.float64),)


class Nested:
    @staticmethod
    def parameters_that_require_grad():
        layer = torch.nn.Linear(3, 2)
        layer.weight.data.fill_(0.5)
        layer.bias.data.fill_(0.1)
        return (lambda p: torch.tanh(p["weight"].sum(1) + p["bias"]).square().sum()), dict(layer.named_parameters())


def linear(): return (lambda x: 3 * x.sum()), torch.ones(4)
def constant(): return (lambda x: torch.tensor(1.0)), torch.ones(4)
def vector(): return (lambda x: 2 * x), torch.ones(4)
def number(): return (lambda x: 2.0), torch.ones(4)
def integer(): return (lambda x: (x > 0).sum()), torch.ones(4)
def infinite(): return (lambda x: x.log().sum()), torch.zeros(4)
def no_tensor(): return (lambda x: torch.tensor(1.0)), {"a": 3}
def complex_tensor(): return (lambda x: x["z"].abs().sum()), {"z": torch.ones(2, dtype=torch.complex64)}
def large(): return (lambda x: (x**2).sum()), torch.ones(1_000_000)
def kink(): return (lambda x: x["p"]["q"].norm()), {"p": {"q": torch.zeros(3)}}
def random(): return (lambda x: (x**2 * torch.rand(4)).sum()), torch.ones(4)
def only_f(): return lambda x: x
def one(): return (lambda x: x,)
def f_is_a_number(): return 3, torch.ones(2)
def args_is_a_tensor(): return (lambda x, a: (x * a).sum()), torch.ones(2), torch.ones(2)
def fails(): raise ValueError("the user's own")
def f_fails(): return (lambda x: x["absent"]), {"w": torch.ones(2)}
def wants_absent():
    import a_package_that_is_absent
constant_value = 3


class Cube(torch.autograd.Function):
    """Its second derivative is wrong by a factor."""

    @staticmethod
    def forward(x): return x**3
    @staticmethod
    def setup_context(ctx, inputs, output): ctx.save_for_backward(*inputs)
    @staticmethod
    def vmap(info, in_dims, x): return Cube.apply(x), in_dims[0]
    @staticmethod
    def backward(ctx, g): return g * (3 * ctx.saved_tensors[0].detach() ** 2 + 0.1 * (ctx.saved_tensors[0] - 1))


def wrong(): return (lambda x: Cube.apply(x).sum() + x[0] * x[1]), torch.ones(3, dtype=torch.float64)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory with a module of problems in a package, under a name of its own."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "module.py").write_text(PROBLEMS)
    (tmp_path / "broken.py").write_text("import a_package_that_is_absent\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in ("package", "package.module", "broken"):
        sys.modules.pop(name, None)


def report(name, *options):
    return main(["report", f"package.module:{name}", "--quiet", "--out", "made/here", *options])


# The figures ----------------------------------------------------------------------------------------------------------


def test_report_of_a_quadratic_holds_its_closed_form(folder, capsys):
    assert report("quadratic") == 0
    facts = json.loads((folder / "made" / "here" / "report.json").read_text())
    H = torch.diag(torch.tensor([4.0, 3.0, -1.0, 0.0, 2.0], dtype=torch.float64))
    H[0, 2] = H[2, 0] = 0.5
    expected = torch.linalg.eigvalsh(H).flip(0)
    assert facts["n"] == 5 and facts["dtype"] == "float64" and facts["paths"] == ["b", "w"]
    assert facts["eigenvalues"] == pytest.approx(expected.tolist(), abs=1e-14)
    assert facts["top_eigenvalues"][0] == pytest.approx(float(expected[0]))
    assert [facts[f"{sign}_eigenvalues"] for sign in ("positive", "zero", "negative")] == [3, 1, 1]
    assert facts["trace"] == pytest.approx(8.0) and facts["block_traces"] == pytest.approx([4.0, 4.0])
    assert facts["block_norms"] == [pytest.approx([4.0, 0.5]), pytest.approx([0.5, 14**0.5])]
    assert facts["value"] == pytest.approx(0.5)  # w - shift = 1/2, so (3 - 1 + 0 + 2) / 8
    assert facts["gradient_norm"] == pytest.approx((0.25**2 + 1.5**2 + 0.5**2 + 1.0) ** 0.5)
    assert facts["confirmed"] and facts["symmetry_error"] < 1e-14 and facts["product_error"] < 1e-14
    assert facts["certificate_error"] < 1e-9
    assert all((folder / "made" / "here" / picture).stat().st_size > 5_000 for picture in ("blocks.png", "spectrum.png"))
    table = capsys.readouterr().out
    for line in (
        r"n +5 coordinates in 2 leaves",
        r"eigenvalues +3 positive, 1 zero, 1 negative",
        r"trace +8\n",
        r"verdict +confirmed",
    ):
        assert re.search(line, table), line


def test_report_holds_what_the_computation_cost(folder):
    assert report("quadratic", "--chunk-size", "2", "--mode", "forward-over-reverse") == 0
    facts = json.loads((folder / "made" / "here" / "report.json").read_text())
    assert facts["mode"] == "forward-over-reverse" and facts["chunk_size"] == 2
    assert facts["seconds"] > 0 and facts["predicted_bytes"] > 25 * 8
    assert facts["peak_memory_growth_bytes"] is None or facts["peak_memory_growth_bytes"] >= 0


def test_report_of_parameters_that_require_grad(folder):
    assert report("Nested.parameters_that_require_grad") == 0
    facts = json.loads((folder / "made" / "here" / "report.json").read_text())
    # s_i = sum_j w_ij + b_i = 1.6 twice, and H = t'(s_i) times ones(4, 4) for each i, with t = d/ds tanh(s)^2.
    t = torch.tanh(torch.tensor(1.6, dtype=torch.float64))
    curvature = float(2 * (1 - t**2) * (1 - 3 * t**2))
    assert facts["dtype"] == "float32"
    assert facts["trace"] == pytest.approx(8 * curvature, rel=1e-5)
    assert facts["bottom_eigenvalues"][:2] == pytest.approx([4 * curvature] * 2, rel=1e-5)
    assert facts["negative_eigenvalues"] == 2 and facts["zero_eigenvalues"] == 6


def test_report_of_a_linear_function_finds_nothing_but_zeros(folder):
    assert report("linear") == 0
    facts = json.loads((folder / "made" / "here" / "report.json").read_text())
    assert facts["confirmed"] and facts["zero_eigenvalues"] == 4 and facts["certificate_error"] < 1e-2


def test_report_does_not_confirm_a_wrong_derivative(folder, capsys):
    assert report("wrong") == 0
    facts = json.loads((folder / "made" / "here" / "report.json").read_text())
    assert not facts["confirmed"] and facts["differences_settle"] and facts["certificate_error"] > 0.1
    assert "NOT CONFIRMED" in capsys.readouterr().out


def test_same_seed_same_report(tmp_path):
    problem = Problem("cubes", lambda x: (x**3).sum(), torch.arange(1.0, 6.0))
    first, again, other = (model_report(problem, tmp_path, seed=seed, progress=False) for seed in (3, 3, 4))
    assert first["certificate_error"] == again["certificate_error"] != other["certificate_error"]
    assert first["eigenvalues"] == pytest.approx([30.0, 24.0, 18.0, 12.0, 6.0])


def test_table_names_the_blocks_that_count(tmp_path):
    x = {f"leaf{k}": torch.full((1,), float(k + 1)) for k in range(40)}
    facts = model_report(Problem("many", lambda x: sum(t.pow(3).sum() for t in x.values()), x), tmp_path, progress=False)
    table = as_table(facts)
    assert "leaf39" in table and "leaf0 " not in table and "and 10 blocks of smaller norm" in table


def test_progress_is_shown_unless_quiet(folder, capsys):
    assert main(["report", "package.module:quadratic", "--out", "out"]) == 0
    assert "hessian: 100%" in capsys.readouterr().err
    assert report("quadratic") == 0
    assert capsys.readouterr().err == ""


# The digits -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """For many small steps, threads that wait for each other on a busy machine cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_digits_report(tmp_path, monkeypatch, capsys, one_thread):
    state = torch.get_rng_state()
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 0
    where = tmp_path / "functional_hess_report"
    facts = json.loads((where / "report.json").read_text())
    assert facts["n"] == len(facts["eigenvalues"]) == 1_242 and facts["dtype"] == "float64"
    assert facts["training_loss_after"] < 0.1 * facts["training_loss_before"]
    assert facts["test_accuracy_after"] > 0.9 and facts["training_accuracy_after"] > 0.95
    assert facts["confirmed"] and facts["symmetry_error"] < 1e-14
    assert facts["product_error"] < 1e-12 and facts["certificate_error"] < 1e-8
    assert facts["trace"] == pytest.approx(sum(facts["eigenvalues"]), rel=1e-10)
    norms = torch.tensor(facts["block_norms"], dtype=torch.float64)
    assert float(norms.norm()) == pytest.approx(facts["frobenius_norm"], rel=1e-12)
    assert (where / "blocks.png").stat().st_size < 2_000_000 and (where / "spectrum.png").stat().st_size < 300_000
    assert torch.equal(state, torch.get_rng_state())
    err = capsys.readouterr().err
    assert "training" in err and "hessian" in err


def test_digits_are_deterministic():
    first, again, other = (digits_problem(hidden=3, steps=2, seed=seed, progress=False) for seed in (1, 1, 2))
    assert torch.equal(first.params["hidden"]["weight"], again.params["hidden"]["weight"])
    assert not torch.equal(first.params["hidden"]["weight"], other.params["hidden"]["weight"])
    assert not set(map(tuple, first.args[0].tolist())) <= set(map(tuple, other.args[0].tolist()))


# Refusals: one sentence on stderr, status 2 ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("package.module", "named as package.module:problem, got 'package.module'"),
        ("package/module.py:quadratic", "named as package.module:problem"),
        ("", "named as package.module:problem, got ''"),
        ("absent:problem", "no module 'absent'"),
        ("package.absent:problem", "no module 'package.absent'"),
        ("package.module.absent:problem", "no module 'package.module.absent'"),
        ("package.module:absent", "'package.module' has no attribute 'absent'"),
        ("package.module:Nested.absent", "'Nested' has no attribute 'absent'"),
        ("package.module:constant_value", "must be a function that returns (f, params), but is of type int"),
        ("package.module:only_f", "must return (f, params) or (f, params, args), got function"),
        ("package.module:one", "must return (f, params) or (f, params, args), got a tuple of 1"),
        ("package.module:f_is_a_number", "must be callable, got int"),
        ("package.module:args_is_a_tensor", "must be a tuple, got Tensor"),
        ("package.module:vector", "f must return a scalar, a floating tensor of shape (), got one of shape (4,)"),
        ("package.module:number", "f must return a scalar, a floating tensor of shape (), got float"),
        ("package.module:integer", "f must return a scalar, a floating tensor of shape (), got one of shape (), torch.int64"),
        ("package.module:infinite", "f must be finite at params, got -inf"),
        ("package.module:no_tensor", "params holds no floating tensor"),
        ("package.module:complex_tensor", "params['z'] is complex"),
        ("package.module:large", "1,000,000 rows need"),
        ("package.module:constant", "does not depend on x"),
        ("package.module:random", "random numbers"),
        ("package.module:kink", "not finite, the first in the block p.q x p.q"),
    ],
)
def test_what_a_user_got_wrong_is_said_in_one_line(folder, capsys, spec, sentence):
    assert main(["report", spec, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.startswith("functional_hess: ")
    assert err.count("\n") == 1 and "Traceback" not in err


def test_a_limit_on_memory_is_kept(folder, capsys):
    assert report("quadratic", "--memory-limit", "100") == 2
    assert re.search(r"need .* MB .* memory_limit is 0.0 MB; report on fewer leaves", capsys.readouterr().err)
    problem = Problem("squares", lambda x: (x**2).sum(), torch.ones(100))
    with pytest.raises(MemoryError, match="100 eigenvalues need"):
        model_report(problem, folder, memory_limit=100_000, progress=False)


def test_a_folder_that_cannot_be_made_is_refused(folder, capsys):
    (folder / "taken").write_text("a file")
    assert main(["report", "package.module:quadratic", "--quiet", "--out", "taken"]) == 2
    assert "cannot make the folder taken" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "package"), [("matplotlib", "matplotlib"), ("sklearn", "scikit-learn"), ("tqdm", "tqdm")])
def test_a_missing_extra_is_named_with_its_command(folder, capsys, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["report"]) == 2
    expected = f"the report needs {package}, which is not installed: pip install 'functional_hess[report]'."
    assert capsys.readouterr().err == f"functional_hess: {expected}\n"


def test_a_problem_of_ones_own_needs_no_sklearn_and_quiet_no_tqdm(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert report("quadratic") == 0
    with pytest.raises(ReportError, match="needs tqdm"):
        require_extras("tqdm")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fails", ValueError, "the user's own"),
        ("f_fails", KeyError, "absent"),
        ("wants_absent", ModuleNotFoundError, "a_package_that_is_absent"),
    ],
)
def test_an_error_of_the_users_own_comes_out_untouched(folder, name, error, message):
    with pytest.raises(error, match=message):
        report(name)


def test_an_import_that_fails_inside_the_users_module_comes_out_untouched(folder):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_absent"):
        main(["report", "broken:problem", "--quiet"])


def test_the_path_of_imports_is_left_as_it_was(folder):
    before = list(sys.path)
    assert report("quadratic") == 0
    assert sys.path == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["report", "--chunk-size", "0"], "must be 'auto' or a positive number of rows"),
        (["report", "--memory-limit", "much"], "must be a number of bytes or a text such as 4GiB"),
        (["report", "--mode", "guess"], "invalid choice"),
    ],
)
def test_a_wrong_option_is_refused(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


def test_help_tells_what_a_problem_is(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", "--help"])
    assert stopped.value.code == 0 and "(f, params, args)" in capsys.readouterr().out


def test_load_problem_finds_the_function(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    problem = load_problem("package.module:quadratic")
    assert float(problem.f(problem.params, *problem.args)) == pytest.approx(0.5)


def test_the_command_ends_with_the_status(folder):
    command = [sys.executable, "-m", "functional_hess", "report", "package.module:vector", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and "must return a scalar" in ended.stderr
