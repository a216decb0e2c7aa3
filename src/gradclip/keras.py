"""Gradient clipping for Keras 3: an optimizer around an optimizer."""

from gradclip.integrations.keras import Clipped as Clipped
