"""The Gradio app: see what every method keeps, on your own picture."""
