"""The page: a simple txt2img tab, the extensions' tabs beside it, a footer."""

import html
import re
import sys

import gradio as gr

from modules import script_callbacks, sd_samplers, shared
from modules.call_queue import wrap_gradio_gpu_call
from modules.cmd_args import cmd_opts
from modules.processing import VERSIONS, Processing, process_images
from modules.standin import StandIn
from modules.ui_loadsave import UiLoadsave

created = False
GRADIO_4 = int(gr.__version__.split(".")[0]) >= 4
SCRIPT = "js" if GRADIO_4 else "_js"  # the name of an event's script argument

NEW_TASK = "(...values) => ['task(' + Math.random().toString(36).slice(2, 17) + ')', ...values.slice(1)]"
RELOAD = """() => {
    const style = 'font-family: monospace; margin-top: 20%; text-align: center';
    document.body.innerHTML = `<h1 style="${style}">Reloading...</h1>`;
    const again = () => fetch('./internal/ping').then(
        (answer) => answer.ok ? location.reload() : setTimeout(again, 500), () => setTimeout(again, 500));
    setTimeout(again, 2000);
    return [];
}"""
FOOTER = """<div style="text-align: center; font-size: 90%; opacity: 0.85">
<a href="{docs}">API</a> &#x2000;•&#x2000; <a href="https://gradio.app">Gradio</a><br>
version: {version} (stand-in) &#x2000;•&#x2000; python: {python} &#x2000;•&#x2000; gradio: {gradio}</div>"""
# As in the webui, gradio cuts nothing off: what is too wide makes the page wide.
CSS = """
div.gradio-container { overflow: visible !important; }
.standin-footer { justify-content: center; }
.standin-footer button { flex: none; min-width: 9em; }
footer { display: none !important; }
"""


def txt2img(_task, prompt, negative_prompt, sampler, steps, width, height, n_iter, batch_size, cfg_scale, seed):
    """Runs inside the lock, as the button's function."""
    p = Processing(
        {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "sampler_name": sampler,
            "steps": int(steps),
            "width": int(width),
            "height": int(height),
            "n_iter": int(n_iter),
            "batch_size": int(batch_size),
            "cfg_scale": cfg_scale,
            "seed": int(seed),
            "subseed": -1,
            "subseed_strength": 0,
            "seed_resize_from_w": -1,
            "seed_resize_from_h": -1,
            "restore_faces": False,
            "styles": [],
            "override_settings": {},
            "override_settings_restore_afterwards": True,
            "do_not_save_samples": False,
            "do_not_save_grid": False,
            "outpath_samples": shared.opts.outdir_txt2img_samples,
            "outpath_grids": shared.opts.outdir_txt2img_grids,
        },
        StandIn(),
    )
    processed = process_images(p)
    infotext = processed.fields["infotexts"][0].split("\n")[-1]
    return processed.images, f"<p>{html.escape(infotext)}</p>", ""


def create_txt2img():
    with gr.Blocks(analytics_enabled=False) as interface:
        with gr.Row(elem_id="txt2img_toprow"):
            with gr.Column(scale=6):
                prompt = gr.Textbox(
                    label="Prompt", show_label=False, lines=3, elem_id="txt2img_prompt", placeholder="Prompt"
                )
                negative = gr.Textbox(
                    label="Negative prompt",
                    show_label=False,
                    lines=3,
                    elem_id="txt2img_neg_prompt",
                    placeholder="Negative prompt",
                )
            with gr.Column(scale=1):
                generate = gr.Button("Generate", variant="primary", elem_id="txt2img_generate")
                with gr.Row():
                    interrupt = gr.Button("Interrupt", min_width=60, elem_id="txt2img_interrupt")
                    skip = gr.Button("Skip", min_width=60, elem_id="txt2img_skip")
        with gr.Row():
            with gr.Column():
                names = [sampler.name for sampler in sd_samplers.all_samplers]
                with gr.Row():
                    sampler = gr.Dropdown(names, value=names[0], label="Sampling method", elem_id="txt2img_sampling")
                    steps = gr.Slider(1, 150, value=20, step=1, label="Sampling steps", elem_id="txt2img_steps")
                with gr.Row():
                    width = gr.Slider(64, 2048, value=512, step=8, label="Width", elem_id="txt2img_width")
                    n_iter = gr.Slider(1, 100, value=1, step=1, label="Batch count", elem_id="txt2img_batch_count")
                with gr.Row():
                    height = gr.Slider(64, 2048, value=512, step=8, label="Height", elem_id="txt2img_height")
                    batch = gr.Slider(1, 8, value=1, step=1, label="Batch size", elem_id="txt2img_batch_size")
                cfg = gr.Slider(1, 30, value=7, step=0.5, label="CFG Scale", elem_id="txt2img_cfg_scale")
                seed = gr.Number(label="Seed", value=-1, precision=0, elem_id="txt2img_seed")
            with gr.Column():
                gallery = gr.Gallery(
                    label="Output", show_label=False, columns=4, preview=True, height=450, elem_id="txt2img_gallery"
                )
                info = gr.HTML(elem_id="html_info_txt2img")
                log = gr.HTML(elem_id="html_log_txt2img")
        task = gr.Textbox(visible=False)
        event = dict(
            fn=wrap_gradio_gpu_call(txt2img, [None, ""]),
            inputs=[task, prompt, negative, sampler, steps, width, height, n_iter, batch, cfg, seed],
            outputs=[gallery, info, log],
            show_progress="full",
            **{SCRIPT: NEW_TASK},
        )
        generate.click(**event)
        prompt.submit(**event)
        interrupt.click(fn=shared.state.interrupt, inputs=[], outputs=[], queue=False)
        skip.click(fn=shared.state.skip, inputs=[], outputs=[], queue=False)
    return interface


def keep_pages_local():
    """Takes out of gradio's page what a browser would fetch from elsewhere."""
    original = gr.routes.templates.TemplateResponse
    elsewhere = re.compile(rb'<(?:link\s+rel="preconnect"|script\s+src="https:)[^>]*>(?:\s*</script>)?')

    def template_response(*args, **kwargs):
        response = original(*args, **kwargs)
        response.body = elsewhere.sub(b"", response.body)
        response.init_headers()
        return response

    gr.routes.templates.TemplateResponse = template_response


def theme():
    """Gradio's own, with fonts that are there: its default ones would be asked of Google."""
    return gr.themes.Default(
        font=["Source Sans Pro", "ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["IBM Plex Mono", "ui-monospace", "Consolas", "monospace"],
    )


def create_ui():
    global created
    created = True
    loadsave = UiLoadsave(cmd_opts.ui_config_file)
    script_callbacks.ui_settings_callback()
    interfaces = [(create_txt2img(), "txt2img", "txt2img")] + script_callbacks.ui_tabs_callback()
    shared.tab_names = [label for _, label, _ in interfaces]

    with gr.Blocks(theme=theme(), analytics_enabled=False, title="Stable Diffusion", css=CSS) as demo:
        with gr.Tabs(elem_id="tabs"):
            for interface, label, name in interfaces:
                if label in shared.opts.hidden_tabs:
                    continue
                with gr.TabItem(label, id=name, elem_id="tab_" + name):
                    interface.render()
                loadsave.add_block(interface, name)
        version = ".".join(map(str, sys.version_info[:3]))
        docs = "/docs" if cmd_opts.api else "https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API"
        gr.HTML(
            FOOTER.format(docs=docs, version=VERSIONS[cmd_opts.shape], python=version, gradio=gr.__version__),
            elem_id="footer",
        )
        with gr.Row(elem_classes=["standin-footer"]):
            reload = gr.Button("Reload UI", size="sm", elem_id="settings_restart_gradio")
        reload.click(fn=shared.state.request_restart, inputs=[], outputs=[], queue=False, **{SCRIPT: RELOAD})
    loadsave.save()
    return demo


def setup_ui_api(app):
    app.add_api_route("/internal/ping", lambda: {}, methods=["GET"])
