"""Weights of the plain network load before or after; timm's own slot; taking attention out."""

import timm

import spem

plain = timm.create_model("resnet18", num_classes=10)
model = timm.create_model("resnet18", num_classes=10)
spem.attach(model, "spem")
found = model.load_state_dict(plain.state_dict(), strict=False)
assert not found.unexpected_keys
assert not set(found.missing_keys) & set(plain.state_dict())  # all of the host's are there
print(f"{len(found.missing_keys)} keys are the attention's, the first: {found.missing_keys[0]}")

spem.detach(model)
assert list(model.state_dict()) == list(plain.state_dict())

# timm's ResNets also build an attention into every block themselves. It starts as the module does,
# which is right for a network that is trained from the start.
built = timm.create_model("resnet18", block_args={"attn_layer": spem.attn_layer("spem")})
print(f"{sum(p.numel() for p in built.parameters()):,} parameters")
