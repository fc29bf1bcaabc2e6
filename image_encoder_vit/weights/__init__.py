"""
Checkpoints: find the encoder in them, pull it, push it, describe it. Public are `pull.pull`, `push.push`,
`export.export_weights`, and for layouts of one's own `layouts.find_layout`.
"""
