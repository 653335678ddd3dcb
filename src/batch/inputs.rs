//! [`IntoInputs`]: iterators and streams alike are the inputs of a batch.

use futures::{Stream, stream};

/// Anything that iterates or streams can be the inputs of a batch.
///
/// `M` tells iterators and streams apart; it is inferred and never written.
#[diagnostic::on_unimplemented(
    message = "`{Self}` can be neither iterated nor streamed",
    label = "not the inputs of a batch",
    note = "a batch takes any `IntoIterator` (Send, as its iterator) or any `Stream` (Send)"
)]
pub trait IntoInputs<M> {
    /// What one item takes.
    type Item;
    /// The inputs as a stream.
    type Stream: Stream<Item = Self::Item> + Send;

    /// The inputs as a stream.
    fn into_inputs(self) -> Self::Stream;
}

/// Marks inputs that come from an iterator.
#[doc(hidden)]
pub struct FromIter;

/// Marks inputs that come from a stream.
#[doc(hidden)]
pub struct FromStream;

impl<I> IntoInputs<FromIter> for I
where
    I: IntoIterator<IntoIter: Send>,
{
    type Item = I::Item;
    type Stream = stream::Iter<I::IntoIter>;

    fn into_inputs(self) -> Self::Stream {
        stream::iter(self)
    }
}

impl<S: Stream + Send> IntoInputs<FromStream> for S {
    type Item = S::Item;
    type Stream = S;

    fn into_inputs(self) -> Self::Stream {
        self
    }
}
