"""A deadline for silence."""

import asyncio

import pytest

from vcproxy.kube.patience import patience


async def test_silence_ends_in_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        async with patience(0.01):
            await asyncio.Event().wait()


async def test_what_is_heard_postpones_it() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(TimeoutError):
        async with patience(0.05) as patient:
            while loop.time() < began + 0.15:
                patient.heard()
                await asyncio.sleep(0)
            last = loop.time()
            await asyncio.Event().wait()
    assert last + 0.04 < loop.time()


async def test_while_nobody_listens_nothing_is_missed() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(TimeoutError):
        async with patience(0.01) as patient:
            patient.heard(0.1)
            await asyncio.Event().wait()
    assert loop.time() >= began + 0.1


async def test_an_end_in_good_order_leaves_no_timer() -> None:
    async with patience(0.01) as patient:
        pass
    assert patient._timer.cancelled()
