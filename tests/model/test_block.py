"""The transformer block's stochastic depth, and groups of blocks."""

import pytest
import torch

from vrt.model.block import Block, BlockGroup, compile_blocks


def make_block(drop_path: float) -> Block:
    torch.manual_seed(0)
    return Block(8, (2, 4, 4), (0, 0, 0), heads=2, mlp_ratio=2.0, qkv_bias=True, mutual=True, drop_path=drop_path)


def test_each_sample_keeps_or_loses_a_whole_branch_and_the_mean_stays() -> None:
    block = make_block(0.25).train()
    torch.manual_seed(1)
    kept = block._draw(torch.ones(4000, 1, 2, 2, 3))
    assert kept.shape == (4000, 1, 1, 1, 1)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert kept.mean().item() == pytest.approx(1, abs=0.03)


def test_evaluation_and_a_rate_of_zero_draw_nothing() -> None:
    torch.manual_seed(1)
    before, x = torch.get_rng_state(), torch.rand(0)
    for block in (make_block(0.5).eval(), make_block(0.0).train()):
        torch.set_rng_state(before)
        block(torch.ones(1, 2, 4, 4, 8) + x.sum())
        assert torch.equal(torch.get_rng_state(), before)


def test_every_second_block_of_a_group_is_shifted_by_half_a_window() -> None:
    group = BlockGroup(8, (6, 8, 8), 2, 2.0, True, mutual=False, drop_path=[0.0] * 4, use_checkpoint=False)
    assert [block.shift for block in group.blocks] == [(0, 0, 0), (3, 4, 4), (0, 0, 0), (3, 4, 4)]


def test_shifted_blocks_carry_information_across_window_borders_and_unshifted_ones_do_not() -> None:
    x = torch.rand(1, 2, 8, 8, 8)
    changed = x.clone()
    changed[:, :, 3, 3] += torch.rand(8)
    for shift, reached in (((0, 0, 0), False), ((0, 2, 2), True)):
        torch.manual_seed(0)
        block = Block(8, (2, 4, 4), shift, heads=2, mlp_ratio=2.0, qkv_bias=True, mutual=False, drop_path=0.0)
        difference = (block(x) - block(changed)).abs().amax(dim=(0, 1, 4))
        assert (difference[4, 4] > 0) == reached
        # The other end of the map, which the cyclic shift brings into the same window as the near end, stays out of reach.
        assert difference[7, 7] == 0


@pytest.mark.long
def test_compiled_blocks_have_the_results_and_gradients_of_the_others_and_drop_the_same_branches() -> None:
    torch.manual_seed(0)
    group = BlockGroup(8, (2, 4, 4), 2, 2.0, True, mutual=True, drop_path=[0.0, 0.5], use_checkpoint=True).train()
    x = torch.rand(6, 2, 8, 8, 8)

    def outcome() -> list[torch.Tensor]:
        torch.manual_seed(1)
        out = group(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(group.parameters()))]

    plain = outcome()
    # Tests before this one may have compiled, too.
    torch._dynamo.utils.counters.clear()
    compile_blocks(group)
    for found, expected in zip(outcome(), plain):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
