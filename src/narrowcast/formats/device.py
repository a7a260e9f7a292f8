"""The codecs on torch tensors outside main memory."""
