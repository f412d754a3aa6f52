"""Discrete-event simulation: the clock, processes, messages, and random streams."""

import gc

import pytest

from interlayer.core.events import Entity, World


def test_things_happen_in_the_order_of_their_times():
    world, seen = World(), []

    def steps(name, delay):
        for _ in range(2):
            yield world.wait(delay)
            seen.append((name, world.now))
        return name

    slow, fast = world.process(steps("slow", 3.0)), world.process(steps("fast", 1.0))
    assert world.run(fast) == "fast" and seen == [("fast", 1.0), ("fast", 2.0)]
    world.run(slow & fast)
    assert seen[2:] == [("slow", 3.0), ("slow", 6.0)]


def test_a_message_arrives_after_its_delay_with_what_was_sent():
    class Listener(Entity):
        def get(self, message):
            heard.append((message, self.world.now))

    world, heard = World(unit="ms"), []
    alice, bob = Entity(world, "alice"), Listener(world, "bob")
    alice.send("late", bob.get, delay=2.0)
    alice.send("early", bob.get, delay=0.5)
    alice.send("never heard", alice.get, delay=0.1)
    world.run()
    assert heard == [("early", 0.5), ("late", 2.0)]


def test_a_stream_depends_on_the_seed_and_the_name_alone():
    one, two = World(seed=1), World(seed=1)
    two.stream("other").random(100)
    assert Entity(one, "a").random.random(4).tolist() == Entity(two, "a").random.random(4).tolist()
    assert one.stream("a").random() != one.stream("b").random() != World(seed=2).stream("b").random()


def test_an_event_wakes_who_waits_for_it():
    world, seen = World(), []
    bell = world.event()

    def waiter():
        seen.append((yield bell | world.wait(9.0)))

    world.process(waiter())
    Entity(world, "x").send("ding", bell.succeed, delay=1.0)
    world.run()
    assert list(seen[0].values()) == ["ding"]


@pytest.mark.parametrize("delay", [-1.0, float("nan")])
def test_a_delay_into_the_past_is_refused(delay):
    with pytest.raises(ValueError, match=r"World: a delay of .*; expected 0 or more"):
        World(unit="s").wait(delay)


def test_a_run_leaves_the_garbage_collector_as_it_was():
    def broken():
        seen.append(gc.get_threshold()[0])
        yield world.wait(1.0)
        raise KeyError("inside")

    world, seen, before = World(), [], gc.get_threshold()
    world.process(broken())
    with pytest.raises(KeyError):
        world.run()
    assert gc.get_threshold() == before and seen[0] >= 100_000
