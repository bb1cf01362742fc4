"""Composable second-order calculus for PyTorch functions of trees of parameters."""

from functional_hess import coloring, testing, tree
from functional_hess.chunking import MemoryLimitError
from functional_hess.explanation import explain
from functional_hess.extrapolation import FiniteDifferenceWarning
from functional_hess.guards import LowPrecisionWarning, MissingDerivativeError, RandomnessError
from functional_hess.impurity import ImpurityError, ImpurityWarning
from functional_hess.jacobians import jacfwd, jacrev
from functional_hess.levels import DependenceError
from functional_hess.modules import functionalize_module
from functional_hess.per_sample import sample_gradient_norms, sample_gradients
from functional_hess.plans import SparsePlan
from functional_hess.prepared import prepare
from functional_hess.products import grad_and_hvp, hvp
from functional_hess.risk import empirical_risk
from functional_hess.second_order import (
    hessian,
    hessian_blocks,
    hessian_diagonal,
    hessian_rows,
    value_grad_and_hessian,
)
from functional_hess.sparse import load_plan, sparse_hessian, sparse_jacobian
from functional_hess.sparsity import SparsityError
from functional_hess.transforms import grad, jvp, linearize, value_and_grad, vjp, vmap
from functional_hess.tree import Space, partition, register
from functional_hess.verification import Record, checked

__all__ = [
    # trees
    "Space",
    "partition",
    "register",
    "functionalize_module",
    "tree",
    # first order
    "grad",
    "value_and_grad",
    "jvp",
    "vjp",
    "linearize",
    "jacfwd",
    "jacrev",
    "vmap",
    # sums over samples
    "empirical_risk",
    "sample_gradients",
    "sample_gradient_norms",
    # second order
    "hvp",
    "grad_and_hvp",
    "hessian",
    "value_grad_and_hessian",
    "hessian_rows",
    "hessian_blocks",
    "hessian_diagonal",
    "explain",
    "prepare",
    # sparse derivatives
    "sparse_hessian",
    "sparse_jacobian",
    "load_plan",
    "SparsePlan",
    "coloring",
    # checks and errors
    "checked",
    "Record",
    "testing",
    "DependenceError",
    "FiniteDifferenceWarning",
    "ImpurityError",
    "ImpurityWarning",
    "LowPrecisionWarning",
    "MemoryLimitError",
    "MissingDerivativeError",
    "RandomnessError",
    "SparsityError",
]
