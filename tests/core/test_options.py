from collections.abc import Callable
from typing import Literal

import pytest
from torch import Tensor

from interlayer.core.options import checked

Late = "NotThere | str"


class Maker:
    def __init__(
        self,
        *,
        share: float = 0.5,
        rounds: int = 1,
        mode: Literal["a", "b"] = "a",
        loss: Callable[[Tensor], Tensor] | None = None,
        weight: float | None = None,
        flag: bool = True,
        late: "Late | None" = None,
    ) -> None:
        pass


def test_what_fits_is_given_back():
    given = {"share": 1, "rounds": 2, "mode": "b", "loss": abs, "weight": None, "flag": False, "late": 3}
    assert checked(Maker, given, "maker") == given


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"shares": 0.5}, "maker: no option 'shares'. Did you mean 'share'? It takes share, rounds"),
        ({"share": "0.5"}, "maker: share was '0.5'; expected a valid number."),
        ({"rounds": 1.5}, "maker: rounds was 1.5; expected a valid integer"),
        ({"rounds": True}, "maker: rounds was True; expected a valid integer"),
        ({"mode": "c"}, "maker: mode was 'c'; expected 'a' or 'b'."),
        ({"loss": 3}, "maker: loss was 3; expected callable"),
        ({"flag": 1}, "maker: flag was 1; expected a valid boolean"),
        ({"weight": "x"}, "maker: weight was 'x'; expected a valid number"),
    ],
)
def test_what_does_not_fit_is_one_error(given, says):
    with pytest.raises(ValueError) as caught:
        checked(Maker, given, "maker")
    assert str(caught.value).startswith(says)
