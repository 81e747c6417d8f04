"""The start values of the controls: written to ui-config.json at the first start, put back at the next."""

import json

import gradio as gr

from modules import errors

VISIBLE = (gr.Slider, gr.Radio, gr.Checkbox, gr.Textbox, gr.Number, gr.Dropdown, gr.Button)


class UiLoadsave:
    def __init__(self, filename):
        self.filename = filename
        self.settings = {}
        self.broken = False
        try:
            with open(filename, encoding="utf8") as file:
                self.settings = json.load(file)
        except FileNotFoundError:
            pass
        except Exception as error:
            self.broken = True
            errors.display(error, "loading settings")
        self.found = dict(self.settings)

    def add_block(self, block, path):
        """Takes every control inside a block. One without a label has no name to be kept under."""
        if hasattr(block, "children"):
            if isinstance(block, gr.Tabs) and block.elem_id is not None:
                self._add(f"{path}/Tabs@{block.elem_id}", block)
            for child in block.children:
                self.add_block(child, path)
        elif getattr(block, "label", None) is not None:
            self._add(f"{path}/{block.label}", block)
        elif isinstance(block, gr.Button) and block.value is not None:
            self._add(f"{path}/{block.value}", block)

    def _add(self, path, control):
        kind = type(control)
        if kind in VISIBLE and control.visible:
            self._apply(path, control, "visible")
        if kind in (gr.Slider, gr.Checkbox, gr.Textbox, gr.Number):
            self._apply(path, control, "value")
        if kind is gr.Slider:
            for field in ("minimum", "maximum", "step"):
                self._apply(path, control, field)
        if kind in (gr.Radio, gr.Dropdown):
            self._apply(path, control, "value", allowed=_choices(control))

    def _apply(self, path, control, field, allowed=None):
        if getattr(control, "do_not_save_to_config", False):
            return
        key = f"{path}/{field}"
        saved = self.settings.get(key)
        if saved is None:
            self.settings[key] = getattr(control, field)
            return
        if allowed is not None:
            values = saved if isinstance(saved, list) else [saved]
            if any(value not in allowed for value in values):
                return
        if field == "value" and isinstance(control, gr.Textbox):
            saved = str(saved)
        elif field == "value" and isinstance(control, gr.Number):
            try:
                saved = float(saved)
            except ValueError:
                return
        setattr(control, field, saved)

    def save(self):
        if self.settings == self.found or self.broken:
            return
        with open(self.filename, "w", encoding="utf8") as file:
            json.dump(self.settings, file, indent=4, ensure_ascii=False)


def _choices(control):
    return [choice[0] if isinstance(choice, (tuple, list)) else choice for choice in control.choices or []]
