//! Where tensors are computed. There is one backend so far, [`cpu::Cpu`]; its methods are the blocks of a decoder
//! (`begin · attention · route · experts · combine · logits`), which is the seam a second backend will share. Never
//! op-level: a backend owns its activations and decides how a block is fused.

pub(crate) mod cpu;
