"""The text that travels inside an image and says how it was made."""

import re

PAIR = re.compile(r'\s*([\w ]+):\s*("(?:\\.|[^"])+"|[^,]*)(?:,|$)')


def create_infotext(p, index):
    pairs = {
        "Steps": p.steps,
        "Sampler": p.sampler_name,
        "Schedule type": p.scheduler or "Automatic",
        "CFG scale": p.cfg_scale,
        "Seed": p.all_seeds[index],
        "Size": f"{p.width}x{p.height}",
        "Model hash": "0123456789",
        "Model": "standin",
        "Denoising strength": p.denoising_strength if p.init_images else None,
        "Variation seed": p.all_subseeds[index] if p.subseed_strength else None,
        "Variation seed strength": p.subseed_strength or None,
        "Version": p.version,
    }
    negative = p.all_negative_prompts[index]
    lines = [p.all_prompts[index], "Negative prompt: " + negative if negative else ""]
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items() if value is not None))
    return "\n".join(filter(None, lines))


def parse_generation_parameters(text):
    *lines, last = text.strip().split("\n")
    parameters = dict(PAIR.findall(last))
    if len(parameters) < 3:
        lines, parameters = lines + [last], {}
    prompt, _, negative = "\n".join(lines).partition("Negative prompt:")
    return {"Prompt": prompt.strip(), "Negative prompt": negative.strip(), **parameters}
