"""One way to declare an operator, with which all operators of this folder are declared.

An operator is a function that PyTorch knows by name (``torch.ops.cryoalign.<name>``), so that
torch.compile, autograd and the choice of a GPU or CPU implementation work for it. The function
that is declared is also the implementation that runs where no compiled one can.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Body = Callable[..., Any]


def operator(
    *, fake: Body, check: Body | None = None, cpu: Body | None = None, cuda: Body | None = None
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Declare the function below this decorator as the operator ``cryoalign::<function's name>``.

    The function's signature is the operator's schema, its docstring is the operator's help, and
    its body, in PyTorch, serves every input on every device. All functions given here are called
    with all of the operator's arguments by position, defaults included.

    Args:
        fake: returns empty tensors of the result's shape and dtype, for torch.compile.
        check: raises ValueError for arguments that do not fit; called before any implementation.
        cpu: the compiled implementation for tensors on a CPU. It returns None for inputs that it
            does not serve; the PyTorch body then runs.
        cuda: the same for tensors on an NVIDIA GPU.

    Returns:
        A decorator whose result is an ordinary function with the same signature and docstring. It
        calls the operator; its ``__wrapped__`` is the PyTorch body.
    """

    def declare(body: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        in_pytorch: Body = body
        defaults = [each.default for each in inspect.signature(body).parameters.values()]

        def with_defaults(run: Body) -> Body:
            # PyTorch leaves out trailing arguments that have their default value.
            return lambda *args: run(*args, *defaults[len(args) :])

        def implementation(compiled: Body | None) -> Body:
            def run(*args: Any) -> Any:
                if check is not None:
                    check(*args)
                result = None if compiled is None else compiled(*args)
                return in_pytorch(*args) if result is None else result

            return with_defaults(run)

        name = f"cryoalign::{body.__name__}"
        schema = torch.library.infer_schema(body, mutates_args=())
        defined = torch.library.custom_op(
            name, implementation(None), mutates_args=(), schema=schema
        )
        for device, compiled in (("cpu", cpu), ("cuda", cuda)):
            if compiled is not None:
                defined.register_kernel(device)(implementation(compiled))
        defined.register_fake(with_defaults(fake))
        overload = getattr(torch.ops.cryoalign, body.__name__).default

        @functools.wraps(body)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            return overload(*args, **kwargs)

        return call

    return declare
