"""The decorator that hands the LoRA scale of a forward call to the LoRA layers."""

try:
    from diffusers.utils import apply_lora_scale
except ImportError:  # diffusers 0.36 has the two functions, but not yet the decorator
    import functools
    from collections.abc import Callable

    from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

    def apply_lora_scale(kwargs_name: str) -> Callable[[Callable], Callable]:
        """Take `scale` out of the keyword argument `kwargs_name` and weight the LoRA layers with it in the call."""

        def decorator(forward: Callable) -> Callable:
            @functools.wraps(forward)
            def wrapper(self, *args, **kwargs):
                attention_kwargs = dict(kwargs.get(kwargs_name) or {})
                lora_scale = attention_kwargs.pop("scale", 1.0)
                if kwargs.get(kwargs_name) is not None:
                    kwargs[kwargs_name] = attention_kwargs
                if not USE_PEFT_BACKEND:
                    return forward(self, *args, **kwargs)
                scale_lora_layers(self, lora_scale)
                try:
                    return forward(self, *args, **kwargs)
                finally:
                    unscale_lora_layers(self, lora_scale)

            return wrapper

        return decorator


__all__ = ["apply_lora_scale"]
