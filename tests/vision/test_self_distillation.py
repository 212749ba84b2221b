"""Self-distillation: views in one pack, a loss over pairs, and a teacher that no gradient reaches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_pictures import (
    CONFIG,
    CROPS,
    TOKENIZER,
    built,
    objective_of,
    packed_views,
    picture_records,
    take_step,
    with_life,
)
from torch import nn

from labelled import ready
from meristem.data.parts import RunData
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.errors import ConfigError
from meristem.model.config import Learned
from meristem.objectives.teacher import Teacher
from meristem.train.optim import parameter_groups
from meristem_domains.vision import patches
from meristem_domains.vision.objectives import self_distillation
from meristem_domains.vision.objectives.self_distillation import (
    DISTILLATION,
    KOLEO_EPS,
    SPREAD,
    VIEW,
    SelfDistillation,
    by_record,
    large_views,
    pair_losses,
    spread_term,
)
from meristem_domains.vision.pictures import StandardImage, read_pixels


def test_views_lie_in_one_pack_without_padding(rng):
    objective, records = objective_of(), picture_records(rng, 5)
    assert objective.lengths(np.array([1, 2, 3])).tolist() == [2 * 17 + 2 * 5] * 3
    batch = packed_views(objective, records)
    assert batch.layout.lengths == (5,) * 10 + (17,) * 10
    assert batch.layout.num_rows == 5 * (2 * 17 + 2 * 5)
    assert sorted(zip(batch.records, batch.labels[VIEW].tolist())) == [(r, v) for r in range(5) for v in range(4)]
    pixels = read_pixels(records[0].payload, 3)
    drawn = CROPS.draw(pixels, np.random.default_rng(7))
    views = objective.prepare(records[0], ready(), np.random.default_rng(7))
    for view, (wanted, tokens) in enumerate(zip(drawn, views, strict=True)):
        large_or_small = objective.tokenizers[view >= 2]
        # standardised and back
        np.testing.assert_allclose(large_or_small.decode(tokens), wanted, atol=1e-6)
        assert tokens.positions.max() == (3 if view < 2 else 1)
    other = objective.prepare(records[0], ready(), np.random.default_rng(8))
    assert not np.array_equal(other[0].features, views[0].features)


def test_views_have_their_sizes_whatever_the_size_of_pictures(rng):
    for tokenizer in (
        replace(TOKENIZER, image_px=(32, 24)),
        replace(TOKENIZER, image_px=None, crop="squash", max_patches=9),
    ):
        objective = objective_of()
        objective.bind(RunData(tokenizer))
        views = objective.prepare(picture_records(rng, 1)[0], ready(), rng)
        assert [len(tokens) for tokens in views] == [17, 17, 5, 5]


def test_a_picture_that_is_decoded_already_gives_the_views_of_its_file(rng, monkeypatch):
    """As records have it behind `data.views`; and one that is standardised cannot be cut."""
    objective, [record] = objective_of(), picture_records(rng, 1)
    wanted = objective.prepare(record, ready(), np.random.default_rng(3))
    pixels = objective.tokenizers[0].pixels(record.payload)
    monkeypatch.setattr(patches, "read_pixels", lambda *_: pytest.fail("decoded again"))
    got = objective.prepare(record.with_payload(pixels), ready(), np.random.default_rng(3))
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(one.features, other.features)
    with pytest.raises(ConfigError, match=r"out of whole pictures: data.views must be null"):
        objective.prepare(record.with_payload(StandardImage(pixels)), ready(), rng)


def shuffled(batch, rng):
    """The same records under other numbers, in no order."""
    numbers = rng.permutation(1000)[: max(batch.records) + 1]
    return replace(batch, records=tuple(int(numbers[record]) for record in batch.records))


@torch.no_grad()
def slow_loss(objective, model, extra, batch) -> float:
    """Two loops, one view at a time."""
    teacher, head = extra["teacher"], extra["head"]
    vectors = model.pool(model.trunk(batch).final, batch.layout)
    taught = teacher.model.pool(teacher.model.trunk(batch).final, batch.layout)
    total = 0.0
    for i, record in enumerate(batch.records):
        for j, other in enumerate(batch.records):
            views = int(batch.labels[VIEW][i]), int(batch.labels[VIEW][j])
            if record != other or views[0] > 1 or views[0] == views[1]:
                continue
            scores = (teacher.head(taught[i : i + 1])[0] - teacher.center) / float(teacher.temperature)
            wanted = torch.exp(scores) / torch.exp(scores).sum()
            said = head(vectors[j : j + 1])[0] / objective.student_temperature
            total -= float((wanted * (said - said.exp().sum().log())).sum())
    return total


def test_loss_is_that_of_two_loops_over_views_and_records(rng, monkeypatch):
    objective = objective_of(teacher_temperature=0.07, first_temperature=0.07)
    batch = shuffled(packed_views(objective, picture_records(rng, 6)), rng)
    model, extra = built(objective)
    with_life(extra)
    out = objective.loss_of(model, extra, batch)
    expected = slow_loss(objective, model, extra, batch)
    found = float(out.terms[DISTILLATION].sum.detach())
    assert found == pytest.approx(expected, rel=1e-4)  # float32, and products of other shapes
    assert {name: float(term.count) for name, term in out.terms.items()} == objective.counts(batch)
    assert objective.counts(batch) == {DISTILLATION: 6 * 2 * 3, SPREAD: 12}

    def with_itself(targets, log_probs):
        return -torch.einsum("ngc,nvc->ngv", targets, log_probs)

    def of_others(targets, log_probs):
        return pair_losses(targets.roll(1, 0), log_probs)

    def swapped(targets, log_probs):
        return pair_losses(targets.flip(1), log_probs)

    for mutant in (with_itself, of_others, swapped):
        monkeypatch.setattr(self_distillation, "pair_losses", mutant)
        wrong = float(objective.loss_of(model, extra, batch).terms[DISTILLATION].sum.detach())
        assert wrong != pytest.approx(expected, rel=1e-4)


def test_values_are_found_by_record_and_view_wherever_they_lie(rng):
    objective = objective_of()
    batch = shuffled(packed_views(objective, picture_records(rng, 4)), rng)
    order = torch.from_numpy(rng.permutation(16))
    batch = replace(batch, records=tuple(batch.records[i] for i in order), labels={VIEW: batch.labels[VIEW][order]})
    names = torch.tensor([[record, view] for record, view in zip(batch.records, batch.labels[VIEW].tolist())])
    found = by_record(names.float(), batch, 4)
    assert (found[..., 0] == found[:, :1, 0]).all()
    assert (found[..., 1] == torch.arange(4.0)).all()


def test_the_teacher_sees_the_large_views_alone(rng):
    objective = objective_of()
    batch = packed_views(objective, picture_records(rng, 3))
    large = large_views(batch, 17)
    assert large.layout.lengths == (17,) * 6
    assert sorted(zip(large.records, large.labels[VIEW].tolist())) == [(r, v) for r in range(3) for v in range(2)]
    model, _ = built(objective)
    whole = model.trunk(batch).final[-6 * 17 :]
    # a sequence does not depend on its pack but for rounding
    torch.testing.assert_close(model.trunk(large).final[: 6 * 17], whole, atol=1e-5, rtol=1e-5)


def test_spread_is_the_distance_to_the_nearest_other_record(rng):
    vectors = torch.randn(7, 2, 5, requires_grad=True)
    term = spread_term(vectors, 0.1)
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    expected, unit = 0.0, unit.detach()
    for view in range(2):
        for i in range(7):
            nearest = min(float((unit[i, view] - unit[j, view]).norm()) for j in range(7) if j != i)
            expected -= 0.5 * math.log(nearest**2 + KOLEO_EPS)
    assert float(term.sum.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(term.count) == 14


def test_spread_is_safe_with_few_records_and_with_equal_ones(rng):
    for count in (1, 2, 3):
        one = torch.randn(1, 2, 5).repeat(count, 1, 1).requires_grad_()
        term = spread_term(one, 0.1)
        term.sum.backward()
        assert torch.isfinite(term.sum)
        assert torch.isfinite(one.grad).all()
        if count == 1:
            assert float(term.sum.detach()) == float(term.count) == 0
            assert not one.grad.any()
    zero = torch.zeros(3, 2, 5, requires_grad=True)
    spread_term(zero, 0.1).sum.backward()
    assert torch.isfinite(zero.grad).all()
    objective = objective_of()
    batch = packed_views(objective, picture_records(rng, 1))
    model, extra = built(objective)
    assert objective.counts(batch)[SPREAD] == 0
    loss = take_step(objective, model, extra, batch, torch.optim.SGD(model.parameters(), lr=0.1))
    assert math.isfinite(loss)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    without = objective_of(spread_weight=0.0)
    assert set(without.loss_of(model, extra, batch).terms) == set(without.counts(batch)) == {DISTILLATION}


def test_gradient_reaches_the_student_and_never_the_teacher(rng):
    objective = objective_of()
    batch = packed_views(objective, picture_records(rng, 4))
    model, extra = built(objective)
    out = objective.loss_of(model, extra, batch)
    sum(term.sum for term in out.terms.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in extra["head"].parameters())
    # of the keys' bias softmax takes no notice; that of queries and values in the same vector is moved
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in extra["teacher"].parameters())
    assert not out.targets[DISTILLATION].requires_grad

    class Leaky(Teacher):
        """The mutant: a teacher whose parameters learn."""

        def scores(self, batch):
            return self.head(self.model.pool(self.model.trunk(batch).final, batch.layout))

        def distribution(self, scores):
            return ((scores - self.center) / self.temperature.float()).softmax(-1)

    extra["teacher"].__class__ = Leaky
    extra["teacher"].requires_grad_(True)
    objective.loss_of(model, extra, batch).terms[DISTILLATION].sum.backward()
    assert any(parameter.grad is not None for parameter in extra["teacher"].parameters())


def test_what_is_optimised_is_trunk_and_head_and_not_the_teacher():
    model, extra = built(objective_of())
    groups = parameter_groups(nn.ModuleList([model, extra]), 0.01)
    optimised = {id(parameter) for group in groups for parameter in group["params"]}
    assert optimised == {id(parameter) for part in (model, extra["head"]) for parameter in part.parameters()}
    # the mutant: groups of the model alone
    groups = parameter_groups(model, 0.01)
    assert not {id(p) for p in extra["head"].parameters()} & {id(p) for group in groups for p in group["params"]}


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ConfigError, match="needs pictures; got a tokenizer of alphabet"):
        SelfDistillation(CROPS).bind(RunData(AlphabetTokenizer(("A", "B"))))
    with pytest.raises(ConfigError, match="multiples of a patch, 3; got 16"):
        SelfDistillation(CROPS).bind(RunData(replace(TOKENIZER, image_px=(6, 6), patch_px=3)))
    with pytest.raises(ConfigError, match=r"pool: \{kind: Prefix\}"):
        SelfDistillation(CROPS).bind_model(replace(CONFIG, pool=None))
    with pytest.raises(ConfigError, match=r"\{kind: SinCos2D\}.*got a learned table"):
        SelfDistillation(CROPS).bind_model(replace(CONFIG, position=Learned(max_positions=16, grid=(4, 4))))
    for option, value in (("num_prototypes", 0), ("student_temperature", 0), ("momentum", 1), ("spread_weight", -1)):
        with pytest.raises(ConfigError, match=rf"objective\.{option} must be"):
            SelfDistillation(CROPS, **{option: value})
