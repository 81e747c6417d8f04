"""The samplers' names. They do nothing but appear in the answers."""

from collections import namedtuple

Sampler = namedtuple("Sampler", "name aliases options")

all_samplers = [
    Sampler("DPM++ 2M", ["k_dpmpp_2m"], {"scheduler": "karras"}),
    Sampler("DPM++ SDE", ["k_dpmpp_sde"], {"scheduler": "karras", "second_order": "True"}),
    Sampler("Euler a", ["k_euler_a", "k_euler_ancestral"], {"uses_ensd": "True"}),
    Sampler("Euler", ["k_euler"], {}),
    Sampler("LMS", ["k_lms"], {}),
    Sampler("Heun", ["k_heun"], {"second_order": "True"}),
    Sampler("DDIM", ["ddim"], {}),
    Sampler("UniPC", ["unipc"], {}),
]
all_samplers_map = {sampler.name: sampler for sampler in all_samplers}
schedulers = {"automatic": "Automatic", "uniform": "Uniform", "karras": "Karras", "exponential": "Exponential"}


def find(name):
    """SD.Next takes a sampler's name in any case, or an alias. None if there is no such sampler."""
    same = (s.name for s in all_samplers if s.name.lower() == name.lower() or name in s.aliases)
    return name if name in all_samplers_map else next(same, None)


def get_sampler_and_scheduler(name, scheduler):
    """Takes what a client may write; A1111 uses the first sampler in place of one that it does not know."""
    labels = {**schedulers, **{label: label for label in schedulers.values()}}
    found = labels.get(scheduler, "Automatic")
    name = name or all_samplers[0].name
    for ending, label in labels.items():
        if name.endswith(" " + ending):
            name, found = name[: -len(ending) - 1], label
            break
    return all_samplers_map.get(name, all_samplers[0]).name, found
