//! What a step does between its matrix products, in float32 on a CPU: norms, rotary positions, activations, paged attention.
//!
//! torch does each of these in several passes, and each pass costs microseconds however little there is to do: a decode step of a small
//! model spends half its time there. Every row is computed by itself and in a fixed order, so its bits do not depend on what else is
//! in the batch, nor on the number of threads.

mod attention;
mod block;
mod decoder;
mod layer;
mod matrix;
mod memory;
mod rows;
mod simd;
mod weight;

pub use attention::{Cached, Queries, attend};
pub use decoder::{Decoder, Memory, Places, Tokens};
pub use layer::{Layer, Step};
pub use matrix::{Ahead, Matrix, products_are_fast};
pub use rows::{add_and_norm, norm_heads, place_of_largest, rotate, rows_of, silu_and_multiply, store};
pub use weight::{Bfloat16, Weight};
