//! The builder methods that both providers share, written and documented once.

/// Adds them to an `impl` of a builder with a field `settings`.
macro_rules! shared_setters {
    () => {
        /// Sets the key. White space around it is removed; an empty key is none.
        #[must_use]
        pub fn api_key(mut self, key: impl Into<String>) -> Self {
            self.settings.set_key(key.into());
            self
        }

        /// Sets the address that the API's paths are appended to.
        ///
        /// A query it has is kept and sent with each call.
        #[must_use]
        pub fn base_url(mut self, url: impl Into<String>) -> Self {
            self.settings.base_url = url.into();
            self
        }

        /// Adds a header to every call. Its value is treated as a secret: no `Debug`
        /// shows it, and it is taken out of every error's message.
        #[must_use]
        pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
            self.settings.header(name, value);
            self
        }

        /// Adds a parameter to the query of every call's URL. Its value is not shown by
        /// `Debug` either, but proxies write URLs to their logs: send secrets in a
        /// [`header`](Self::header).
        #[must_use]
        pub fn query(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
            self.settings.query.push((name.into(), value.into()));
            self
        }

        /// Sets whether HTTP/2 is spoken, many calls on one connection. The default is HTTP/1.1,
        /// with a connection for each call in flight.
        ///
        /// An HTTP/2 server lets only so many calls share a connection (often 100), and the rest
        /// wait for their turn, so it pays where connections are scarce: behind a proxy that
        /// counts them, or under a low limit on open files. A server that offers no HTTP/2 over
        /// TLS is spoken to as before; with an `http://` base URL it must speak HTTP/2, as there
        /// is nothing to negotiate with. A request that the server says it has not begun
        /// (a graceful GOAWAY, REFUSED_STREAM) is sent again on another connection, unseen.
        #[must_use]
        pub fn http2(mut self, enabled: bool) -> Self {
            self.settings.http2 = enabled;
            self
        }

        /// Sets after how long a silence an HTTP/2 connection is asked whether it is alive. One
        /// that gives no answer within the same time again is given up, and the calls on it fail.
        /// The default is 10 s; the shortest silence taken is 10 ms and the longest an hour.
        #[must_use]
        pub fn http2_ping(mut self, silence: Duration) -> Self {
            // No ping without an end, and none at a time that no clock can show.
            let (shortest, longest) = (Duration::from_millis(10), Duration::from_secs(3600));
            self.settings.ping = silence.clamp(shortest, longest);
            self
        }

        /// Sets how long making a connection may take, name look-up and TLS included.
        /// The default is 10 s. A call that fails so was not sent and costs nothing.
        #[must_use]
        pub fn connect_timeout(mut self, timeout: Duration) -> Self {
            self.settings.limits.connect = timeout;
            self
        }

        /// Sets how long the head of the reply may take, from the start of the call.
        /// The default is 10 min, as much as the whole call has: a reply that is not
        /// streamed begins only when the model is done.
        #[must_use]
        pub fn first_byte_timeout(mut self, timeout: Duration) -> Self {
            self.settings.limits.first_byte = timeout;
            self
        }

        /// Sets how long a reply may pause once it has begun. The default is 5 min,
        /// because some models think for minutes in the middle of a stream.
        #[must_use]
        pub fn idle_timeout(mut self, timeout: Duration) -> Self {
            self.settings.limits.idle = timeout;
            self
        }

        /// Sets how long a whole call may take. The default is 10 min;
        /// [`Request::timeout`] can only shorten it.
        #[must_use]
        pub fn timeout(mut self, timeout: Duration) -> Self {
            self.settings.limits.whole = timeout;
            self
        }

        /// Sets the largest reply accepted, in bytes: the body, or the text of a stream.
        /// The default is 16 MiB. A larger one ends as a permanent
        /// [`MalformedReply`](crate::ErrorKind::MalformedReply).
        #[must_use]
        pub fn max_body(mut self, bytes: usize) -> Self {
            self.settings.limits.max_body = bytes;
            self
        }

        /// Sets the largest event of a stream accepted, in bytes. The default is 1 MiB.
        #[must_use]
        pub fn max_event(mut self, bytes: usize) -> Self {
            self.settings.limits.max_event = bytes;
            self
        }
    };
}

pub(crate) use shared_setters;
