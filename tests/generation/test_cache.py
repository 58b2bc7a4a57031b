"""The cache gives back what was written, in order, from storage that does not move."""

import pytest
import torch

from moebius.errors import CapacityError
from moebius.generation import KeyValueCache
from moebius.generation.cache import cache_bytes_per_token


@pytest.fixture
def cache(decoder):
    return KeyValueCache.for_decoder(decoder.config, batch=2, capacity=10, dtype=torch.float32, device="cpu")


def write(cache, tokens, seed):
    states = torch.randn(2, 2, tokens, 32, generator=torch.Generator().manual_seed(seed))
    views = [layer.update(states + number, -states - number) for number, layer in enumerate(cache.layers)]
    cache.advance(tokens)
    return states, views


def test_each_layer_gives_all_so_far(cache):
    first, _ = write(cache, 4, seed=0)
    second, views = write(cache, 3, seed=1)
    whole = torch.cat([first, second], dim=2)
    for number, (keys, values) in enumerate(views):
        assert torch.equal(keys, whole + number)
        assert torch.equal(values, -whole - number)
    assert cache.length == 7


def test_storage_stays_where_it_is(cache):
    _, views = write(cache, 4, seed=0)
    before = views[0][0].data_ptr()
    _, views = write(cache, 1, seed=1)
    assert views[0][0].data_ptr() == before == cache.layers[0].keys.data_ptr()


def test_a_forward_that_never_advanced_leaves_no_trace(cache):
    first, _ = write(cache, 4, seed=0)
    cache.layers[0].update(torch.full((2, 2, 3, 32), 99.0), torch.full((2, 2, 3, 32), 99.0))
    second, views = write(cache, 2, seed=1)
    assert torch.equal(views[0][0], torch.cat([first, second], dim=2))


def test_a_cropped_cache_goes_on_from_there(cache):
    first, _ = write(cache, 6, seed=0)
    cache.crop(2)
    second, views = write(cache, 1, seed=1)
    assert torch.equal(views[1][0], torch.cat([first[:, :, :2], second], dim=2) + 1)
    with pytest.raises(ValueError, match="crop"):
        cache.crop(4)


def test_a_grown_cache_holds_the_same_tokens(cache):
    first, _ = write(cache, 6, seed=0)
    larger = cache.grown(20)
    second, views = write(larger, 8, seed=1)
    assert torch.equal(views[0][0], torch.cat([first, second], dim=2))
    assert (larger.capacity, larger.length, cache.length) == (20, 14, 6)


def test_a_full_cache_says_so(cache):
    write(cache, 9, seed=0)
    with pytest.raises(CapacityError, match=r"holds 10 .* 11 are needed"):
        write(cache, 2, seed=1)


def test_a_cache_that_cannot_be_had_names_the_bytes_of_a_token(decoder):
    assert cache_bytes_per_token(decoder.config, torch.float32) == 2 * 2 * 2 * 32 * 4
    with pytest.raises(CapacityError, match="1,024 bytes a token"):
        KeyValueCache.for_decoder(decoder.config, batch=2**20, capacity=2**30, dtype=torch.float32, device="cpu")


def test_unwritten_storage_is_never_read(decoder):
    """Poisoned with NaN, the cache gives the same logits."""
    cache = KeyValueCache.for_decoder(decoder.config, batch=1, capacity=30, dtype=torch.float32, device="cpu")
    for layer in cache.layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        steps = [decoder(part, cache=cache).logits for part in ids.split(4, dim=1)]
        assert torch.allclose(torch.cat(steps, dim=1), decoder(ids).logits, atol=5e-5)
