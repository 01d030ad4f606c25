"""The Gradio app: `foveate demo` shows what a model keeps of a picture. Needs the extra ``demo``."""
