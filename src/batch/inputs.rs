//! [`IntoInputs`]: turns iterators and streams into the inputs of a batch.

use futures::{Stream, stream};

/// A conversion into the inputs of a batch, for all iterators and streams.
///
/// `M` distinguishes iterators from streams; it is inferred and never written.
#[diagnostic::on_unimplemented(
    message = "`{Self}` can be neither iterated nor streamed",
    label = "not the inputs of a batch",
    note = "a batch takes any `IntoIterator` (Send, as its iterator) or any `Stream` (Send)"
)]
pub trait IntoInputs<M> {
    /// The input of one item.
    type Item;
    /// The stream of inputs.
    type Stream: Stream<Item = Self::Item> + Send;

    /// Turns the inputs into a stream.
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
